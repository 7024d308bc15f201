"""The one train step."""

from functools import partial

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.bounds import clip_bounds, weight_range
from megatron_klrl.config.recipe import Aggregation, MismatchCorrection, Recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.kl.config import Correction, Credit, Estimator, KLConfig, Placement
from megatron_klrl.kl.surrogate import loss_terms, reward_advantages
from megatron_klrl.loop.parts import Parts
from megatron_klrl.losses.policy_loss import PolicyLoss, Separable
from megatron_klrl.metrics import step as step_metrics
from megatron_klrl.rl.advantages import ADVANTAGES
from megatron_klrl.rl.aggregation import AGGREGATIONS
from megatron_klrl.rl.mismatch import CORRECTIONS, MismatchWeights
from megatron_klrl.rl.surrogates import SURROGATES


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
    metrics = step_metrics.of_scores(batch, scores, log_ratio_clamp=recipe.kl.log_ratio_clamp)
    metrics |= {"kl/beta": recipe.kl.beta}
    weights = mismatch_weights(batch, scores, recipe)
    if weights is not None:
        metrics |= step_metrics.of_mismatch(weights)
    with parts.timers.span("train"):
        metrics |= _gradient(parts, assemble(batch, scores, recipe), split=split_gradient)
        update = parts.trainer.optim_step()
    metrics |= {"grad/norm": update.grad_norm, "policy/lr": update.lr}
    broken = [name for name, value in metrics.items() if not torch.isfinite(torch.tensor(value))]
    if broken:
        raise WorkError(f"{', '.join(broken)} not finite at optimizer step {parts.trainer.step}")
    return metrics, scores


def _gradient(parts: Parts, batch: TrainBatch, *, split: bool) -> dict[str, float]:
    loss = policy_loss(parts.recipe, batch)
    if not split:
        report = parts.trainer.forward_backward(batch, loss)
        return {"policy/loss": report.loss, **report.metrics}
    found = parts.trainer.split_gradient(batch, loss)
    parted = {"grad/kl_norm": found.kl_norm, "grad/policy_kl_cosine": found.cosine}
    return {"policy/loss": found.loss, **found.metrics, **parted}


def assemble(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> TrainBatch:
    """Advantages of the reward and of the KL's reward side, each by its own rule, for one update."""
    mask = batch.response_mask
    advantages = ADVANTAGES[recipe.algorithm.advantage](batch.rewards, group_size=recipe.loop.group_size)
    weights = mismatch_weights(batch, scores, recipe)
    return TrainBatch(
        tokens=batch.tokens,
        response_mask=mask,
        advantages=advantages.unsqueeze(-1).expand_as(scores.old_logprobs).where(mask, 0.0),
        token_weights=_token_weights(mask, recipe),
        old_logprobs=scores.old_logprobs,
        importance_weights=torch.ones_like(scores.old_logprobs) if weights is None else weights.per_token(mask),
        kl_advantages=_kl_advantages(batch, scores, recipe),
        ref_logprobs=scores.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
    )


def mismatch_weights(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> MismatchWeights | None:
    """What the policy gradient of each token is multiplied by; None without a correction."""
    if recipe.mismatch.correction is MismatchCorrection.NONE:
        return None
    correct = CORRECTIONS[recipe.mismatch.correction]
    bounds = weight_range(recipe.mismatch)
    return correct(scores.old_logprobs, batch.rollout_logprobs, mask=batch.response_mask, **bounds)


def policy_loss(recipe: Recipe, batch: TrainBatch | RolloutBatch) -> PolicyLoss:
    """The loss of one update on a batch; its denominators are the batch's."""
    kl, algorithm = recipe.kl, recipe.algorithm
    has_loss_side = kl.beta > 0 and kl.placement is not Placement.REWARD
    return PolicyLoss(
        num_sequences=batch.response_mask.shape[0],
        num_tokens=max(1, int(batch.response_mask.sum())),
        surrogate=SURROGATES[algorithm.surrogate].bounded(**clip_bounds(algorithm)),
        entropy_bonus=algorithm.entropy_bonus,
        loss_side_kl=partial(_loss_side, config=kl) if has_loss_side else None,
        needs_full_kl=has_loss_side and kl.estimator is Estimator.EXACT,
        kl_separable=_kl_separable(kl),
    )


def _kl_separable(kl: KLConfig) -> Separable:
    """Prefix and sequence ratios, and k2 on the sequence's log-ratio, join the tokens of a sequence."""
    of_tokens = kl.correction in (Correction.NONE, Correction.TOKEN)
    squared_sum = kl.placement is Placement.LOSS and kl.credit is Credit.SEQUENCE
    return Separable.TOKENS if of_tokens and not squared_sum else Separable.SEQUENCES


def _token_weights(mask: Tensor, recipe: Recipe) -> Tensor:
    algorithm = recipe.algorithm
    constant = algorithm.aggregation is Aggregation.CONSTANT_NORM
    length = {"norm_length": algorithm.norm_length or recipe.generation.max_tokens} if constant else {}
    return AGGREGATIONS[algorithm.aggregation](mask, **length)


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
