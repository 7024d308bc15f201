"""The one train step."""

from functools import partial

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.kl.config import Estimator, KLConfig, Placement
from megatron_klrl.kl.surrogate import loss_terms, reward_advantages
from megatron_klrl.loop.parts import Parts
from megatron_klrl.losses.policy_loss import PolicyLoss
from megatron_klrl.metrics import step as step_metrics
from megatron_klrl.rl.advantages import ADVANTAGES
from megatron_klrl.rl.aggregation import AGGREGATIONS


def train_on(batch: RolloutBatch, parts: Parts, *, split_gradient: bool) -> tuple[dict[str, float], TokenScores]:
    """Score a batch, take the gradient of the objective on it, and step.

    Args:
        batch: the step's rollouts.
        parts: of the run.
        split_gradient: also measure the KL term's gradient apart; the update is the same.

    Returns:
        The step's metrics (times excluded) and the scores they come from.

    Raises:
        WorkError: the loss or the gradient is not finite.
    """
    with parts.timers.span("score"):
        scores = parts.trainer.score(batch)
    recipe = parts.recipe
    metrics = step_metrics.of_scores(batch, scores, log_ratio_clamp=recipe.kl.log_ratio_clamp) | {
        "kl/beta": recipe.kl.beta,
        "policy/clip_fraction": 0.0,
    }
    with parts.timers.span("train"):
        metrics |= _gradient(parts, assemble(batch, scores, recipe), split=split_gradient)
        update = parts.trainer.optim_step()
    metrics |= {"grad/norm": update.grad_norm, "policy/lr": update.lr}
    broken = [name for name, value in metrics.items() if not torch.isfinite(torch.tensor(value))]
    if broken:
        raise WorkError(f"{', '.join(broken)} not finite at optimizer step {parts.trainer.step}")
    return metrics, scores


def _gradient(parts: Parts, batch: TrainBatch, *, split: bool) -> dict[str, float]:
    loss = policy_loss(parts.recipe, batch.num_rows)
    if not split:
        return {"policy/loss": parts.trainer.forward_backward(batch, loss)}
    found = parts.trainer.split_gradient(batch, loss)
    return {"policy/loss": found.loss, "grad/kl_norm": found.kl_norm, "grad/policy_kl_cosine": found.cosine}


def assemble(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> TrainBatch:
    """Advantages of the reward and of the KL's reward side, each by its own rule, for one update."""
    mask = batch.response_mask
    advantages = ADVANTAGES[recipe.algorithm.advantage](batch.rewards, group_size=recipe.loop.group_size)
    return TrainBatch(
        tokens=batch.tokens,
        response_mask=mask,
        advantages=advantages.unsqueeze(-1).expand_as(scores.old_logprobs).where(mask, 0.0),
        token_weights=AGGREGATIONS[recipe.algorithm.aggregation](mask),
        kl_advantages=_kl_advantages(batch, scores, recipe),
        ref_logprobs=scores.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
    )


def policy_loss(recipe: Recipe, num_sequences: int) -> PolicyLoss:
    """The loss of one update over ``num_sequences`` sequences."""
    kl = recipe.kl
    has_loss_side = kl.beta > 0 and kl.placement is not Placement.REWARD
    return PolicyLoss(
        num_sequences=num_sequences,
        loss_side_kl=partial(_loss_side, config=kl) if has_loss_side else None,
        needs_full_kl=has_loss_side and kl.estimator is Estimator.EXACT,
    )


def _kl_advantages(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> Tensor:
    if recipe.kl.beta == 0 or recipe.kl.placement is Placement.LOSS:
        return torch.zeros_like(scores.old_logprobs)
    # the penalty is that of the current policy: nothing has stepped since old_logprobs were taken
    return reward_advantages(
        scores.old_logprobs,
        _present(scores.ref_logprobs),
        batch.response_mask,
        config=recipe.kl,
        group_size=recipe.loop.group_size,
        rollout_logprobs=batch.rollout_logprobs,
        full_kl=scores.full_kl,
    )


def _loss_side(logprobs: Tensor, rows: TrainBatch, full_kl: Tensor | None, *, config: KLConfig) -> Tensor:
    return loss_terms(
        logprobs,
        _present(rows.ref_logprobs),
        rows.response_mask,
        config=config,
        rollout_logprobs=rows.rollout_logprobs,
        full_kl=full_kl,
    )


def _present(ref_logprobs: Tensor | None) -> Tensor:
    if ref_logprobs is None:
        raise ValueError("a KL term needs a reference: build the trainer with one")
    return ref_logprobs
