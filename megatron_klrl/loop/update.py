"""From rollouts and scores to what an optimizer step trains on. Pure: nothing here runs a model."""

from functools import partial

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.algorithm import Aggregation, MismatchCorrection, Overlong, RatioTo, Surrogate
from megatron_klrl.config.bounds import clip_bounds, weight_range
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.kl.config import Correction, Credit, Estimator, KLConfig, Placement
from megatron_klrl.kl.surrogate import loss_terms, reward_advantages
from megatron_klrl.losses.policy_loss import PolicyLoss, Separable
from megatron_klrl.rl.advantages import ADVANTAGES
from megatron_klrl.rl.aggregation import AGGREGATIONS
from megatron_klrl.rl.mismatch import CORRECTIONS, MismatchWeights
from megatron_klrl.rl.overlong import overlong_penalty
from megatron_klrl.rl.surrogates import SURROGATES


def shaped_rewards(batch: RolloutBatch, recipe: Recipe) -> Tensor:
    """``[B]`` rewards that advantages are made of: the task's, less the penalty for nearly too long responses."""
    algorithm = recipe.algorithm
    if algorithm.overlong is not Overlong.PENALTY or algorithm.overlong_buffer is None:
        return batch.rewards
    limit = recipe.generation.max_tokens
    return batch.rewards + overlong_penalty(batch.lengths, max_tokens=limit, buffer=algorithm.overlong_buffer)


def task_advantages(batch: RolloutBatch, recipe: Recipe) -> Tensor:
    """``[B]`` advantages of the task reward, over all rows of a train step."""
    rewards = shaped_rewards(batch, recipe)
    return ADVANTAGES[recipe.algorithm.advantage](rewards, group_size=recipe.loop.group_size)


def assemble(
    batch: RolloutBatch,
    scores: TokenScores,
    recipe: Recipe,
    *,
    advantages: Tensor | None = None,
    current: TokenScores | None = None,
) -> TrainBatch:
    """Advantages of the reward and of the KL's reward side, each by its own rule, for one update.

    Args:
        batch: rows of the update, in whole groups.
        scores: of the policy at the start of the step, which ratios are taken to.
        recipe: of the run, with this step's beta.
        advantages: ``[B]`` of the task; None makes them from these rows alone.
        current: scores of the policy that the update changes, where it has moved since the start of the step; the KL's
            reward side is that of this policy, and so are the mismatch weights of a surrogate without a ratio.
    """
    mask = batch.response_mask
    of_task = task_advantages(batch, recipe) if advantages is None else advantages
    # a surrogate with a ratio brings the drift since the start of the step itself
    has_ratio = recipe.algorithm.surrogate is not Surrogate.REINFORCE
    weights = mismatch_weights(batch, scores if has_ratio or current is None else current, recipe)
    to_rollout = recipe.algorithm.ratio_to is RatioTo.ROLLOUT
    return TrainBatch(
        tokens=batch.tokens,
        response_mask=mask,
        advantages=of_task.unsqueeze(-1).expand_as(scores.old_logprobs).where(mask, 0.0),
        token_weights=_token_weights(batch, recipe),
        old_logprobs=batch.rollout_logprobs if to_rollout else scores.old_logprobs,
        importance_weights=torch.ones_like(scores.old_logprobs) if weights is None else weights.per_token(mask),
        kl_advantages=_kl_advantages(batch, current or scores, recipe),
        ref_logprobs=scores.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
    )


def needs_current_scores(recipe: Recipe) -> bool:
    """Whether an update of a policy that has moved since it was scored needs scores of its own."""
    rewarded = recipe.kl.beta > 0 and recipe.kl.placement is not Placement.LOSS
    weighted = recipe.mismatch.correction is not MismatchCorrection.NONE
    return rewarded or (weighted and recipe.algorithm.surrogate is Surrogate.REINFORCE)


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


def _token_weights(batch: RolloutBatch, recipe: Recipe) -> Tensor:
    """Weights of the policy gradient. Denominators stay where cut-off responses are left out of it."""
    algorithm = recipe.algorithm
    constant = algorithm.aggregation is Aggregation.CONSTANT_NORM
    length = {"norm_length": algorithm.norm_length or recipe.generation.max_tokens} if constant else {}
    weights = AGGREGATIONS[algorithm.aggregation](batch.response_mask, **length)
    if algorithm.overlong is Overlong.MASK:
        weights = weights.masked_fill(batch.truncated.unsqueeze(-1), 0.0)
    return weights


def _kl_advantages(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> Tensor:
    if recipe.kl.beta == 0 or recipe.kl.placement is Placement.LOSS:
        return torch.zeros_like(scores.old_logprobs)
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
