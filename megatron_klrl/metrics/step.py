"""The metrics of one step, from its tensors."""

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.kl.config import KLConfig
from megatron_klrl.kl.estimators import k1, k3
from megatron_klrl.kl.ratios import importance_ratios
from megatron_klrl.metrics.weights import effective_share
from megatron_klrl.rl.mismatch import MismatchWeights


def of_rollouts(batch: RolloutBatch, *, weight_version: int) -> dict[str, float]:
    """Reward, length and staleness of what was sampled."""
    staleness = (weight_version - batch.weight_version).float()
    return {
        "reward/mean": float(batch.rewards.mean()),
        "reward/std": float(batch.rewards.std(correction=0)),
        "response/length_mean": float(batch.lengths.float().mean()),
        "response/truncated_fraction": float(batch.truncated.float().mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def of_scores(batch: RolloutBatch, scores: TokenScores, *, log_ratio_clamp: float | None = None) -> dict[str, float]:
    """Entropy, trainer-engine mismatch, and the distance from the reference where there is one.

    Args:
        batch: what was sampled.
        scores: what the trainer says of it.
        log_ratio_clamp: bound of the KL configuration, nats; its fraction is reported where one is set.
    """
    mask = batch.response_mask
    gap = (scores.old_logprobs - batch.rollout_logprobs)[mask]
    found = {
        "policy/entropy": float(scores.entropy[mask].mean()),
        "mismatch/logprob_abs_mean": float(gap.abs().mean()),
        "mismatch/kl": float((torch.expm1(gap) - gap).mean()),
        "mismatch/prob_ratio_mean": float(gap.exp().mean()),
    }
    if scores.ref_logprobs is not None and scores.full_kl is not None:
        found |= _distance(scores.old_logprobs, scores.ref_logprobs, scores.full_kl, mask)
        if log_ratio_clamp is not None:
            beyond = (scores.old_logprobs - scores.ref_logprobs)[mask].abs() > log_ratio_clamp
            found["kl/clamp_fraction"] = float(beyond.float().mean())
    return found


def of_mismatch(weights: MismatchWeights) -> dict[str, float]:
    """What the correction for the gap between trainer and engine did to the weights of the policy gradient."""
    return {
        f"mismatch/{weights.action}_fraction": weights.bounded_fraction(),
        "mismatch/ess": effective_share(weights.values[weights.counted]),
    }


def of_kl_ratios(batch: RolloutBatch, scores: TokenScores, kl: KLConfig) -> dict[str, float]:
    """What the KL's own importance correction works with, at the start of the step; empty without one."""
    ratios = None
    if kl.beta > 0:
        ratios = importance_ratios(scores.old_logprobs, batch.rollout_logprobs, batch.response_mask, config=kl)
    if ratios is None:
        return {}
    return {
        "kl/ratio_ess": effective_share(ratios.values),
        "kl/ratio_log_max": ratios.log_largest,
        "kl/ratio_truncated_fraction": ratios.truncated_fraction,
    }


def _distance(logprobs: Tensor, ref_logprobs: Tensor, full_kl: Tensor, mask: Tensor) -> dict[str, float]:
    per_token = full_kl[mask]
    return {
        "kl/k1": per_sequence(k1(logprobs, ref_logprobs), mask),
        "kl/k3": per_sequence(k3(logprobs, ref_logprobs), mask),
        "kl/exact": per_sequence(full_kl, mask),
        "kl/p95": float(per_token.quantile(0.95)) if per_token.numel() <= 2**24 else float(_p95_of_many(per_token)),
        "kl/max": float(per_token.max()),
    }


def _p95_of_many(values: Tensor) -> Tensor:
    """``Tensor.quantile`` refuses more than 2**24 values; the k-th smallest is the same up to interpolation."""
    return values.kthvalue(int(0.95 * values.numel())).values


def per_sequence(per_token: Tensor, mask: Tensor) -> float:
    """Sum over response tokens, mean over sequences."""
    return float(per_token.where(mask, 0.0).sum(-1).mean())
