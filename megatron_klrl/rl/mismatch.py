"""Weights that correct the policy gradient for the gap between the policy that trains and the one that sampled.

``w = pi_old / mu``: the trainer's own recompute over what the engine sampled with. Where both hold the same weights
it is 1 but for numerics; with stale rollouts it holds the updates in between. It multiplies the policy-gradient term
alone: the KL has a correction of its own (``kl.correction``), the entropy bonus none. Denominators stay what they were:
what is masked is not made up for.

The weight of a sequence is the product over its tokens, not the geometric mean. The product is the importance weight of
what was sampled, so a sequence correction is unbiased up to its bounds. The mean does not grow with length, so that one
threshold suits all, but it is the importance weight of nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Action(StrEnum):
    """What a correction does to a weight beyond its bound."""

    TRUNCATED = "truncated"
    MASKED = "masked"


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchWeights:
    """Weights of tokens ``[B, S]``, or of sequences ``[B, 1]``.

    Attributes:
        values: weights after the correction, never differentiable.
        bounded: bool, where a bound acted.
        counted: bool, response tokens; or sequences with any.
        action: of the bounds.
    """

    values: Tensor
    bounded: Tensor
    counted: Tensor
    action: Action

    def per_token(self, mask: Tensor) -> Tensor:
        """``[B, S]`` weight of each token; 1 outside the mask."""
        return self.values.expand_as(mask).where(mask, 1.0)

    def bounded_fraction(self) -> float:
        """Share of the counted tokens (or sequences) on which the bound acted."""
        return float((self.bounded & self.counted).sum() / self.counted.sum().clamp(min=1))


def token_truncate(old_logprobs: Tensor, rollout_logprobs: Tensor, *, mask: Tensor, high: float) -> MismatchWeights:
    """``min(w_t, high)``: no token counts more than ``high`` times; biased where truncated, and by the prefix left out.

    Args:
        old_logprobs: ``[B, S]`` trainer's recompute.
        rollout_logprobs: ``[B, S]`` what the engine sampled with.
        mask: ``[B, S]`` bool.
        high: largest weight.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS).
    """
    return _truncated(_token_weights(old_logprobs, rollout_logprobs, mask), mask, high=high)


def token_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, mask: Tensor, low: float, high: float
) -> MismatchWeights:
    """``w_t`` in ``[low, high]``, else 0: tokens that trainer and engine disagree on teach nothing.

    Args:
        old_logprobs: as in `token_truncate`.
        rollout_logprobs: see there.
        mask: see there.
        low: smallest weight that is kept.
        high: largest weight that is kept.

    Source: Ling Team 2025 (IcePop), arXiv 2510.18855.
    """
    return _masked(_token_weights(old_logprobs, rollout_logprobs, mask), mask, low=low, high=high)


def prefix_truncate(old_logprobs: Tensor, rollout_logprobs: Tensor, *, mask: Tensor, high: float) -> MismatchWeights:
    """``min(prod_{u <= t} w_u, high)``: a token with all that led to it; unbiased up to the bound for per-token credit.

    What follows a token is left out of its weight, so for an advantage of the whole response the weight is that of the
    prefix alone: less variance than `sequence_truncate`, unbiased only where the advantage does not depend on it.

    Args:
        old_logprobs: as in `token_truncate`.
        rollout_logprobs: see there.
        mask: see there.
        high: largest weight.

    Source: Precup, Sutton & Singh 2000, "Eligibility traces for off-policy policy evaluation" (per-decision).
    """
    log_weights = (old_logprobs - rollout_logprobs).where(mask, 0.0).detach().cumsum(-1)
    # cut before the exponential: a long prefix may overflow it
    values = log_weights.clamp(max=math.log(high)).exp()
    return MismatchWeights(values=values, bounded=log_weights > math.log(high), counted=mask, action=Action.TRUNCATED)


def sequence_truncate(old_logprobs: Tensor, rollout_logprobs: Tensor, *, mask: Tensor, high: float) -> MismatchWeights:
    """``min(prod_t w_t, high)`` for every token of a sequence: unbiased up to the bound, noisy for long responses.

    Args:
        old_logprobs: as in `token_truncate`.
        rollout_logprobs: see there.
        mask: see there.
        high: largest weight.

    Source: Liu, Li et al. 2025, "When Speed Kills Stability" (Seq-TIS).
    """
    weights, counted = _sequence_weights(old_logprobs, rollout_logprobs, mask)
    return _truncated(weights, counted, high=high)


def sequence_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, mask: Tensor, low: float, high: float
) -> MismatchWeights:
    """``prod_t w_t`` in ``[low, high]``, else 0, for every token of a sequence.

    Args:
        old_logprobs: as in `token_truncate`.
        rollout_logprobs: see there.
        mask: see there.
        low: smallest weight that is kept.
        high: largest weight that is kept.

    Source: Liu, Li et al. 2025, "When Speed Kills Stability" (Seq-MIS).
    """
    weights, counted = _sequence_weights(old_logprobs, rollout_logprobs, mask)
    return _masked(weights, counted, low=low, high=high)


CORRECTIONS: dict[str, Callable[..., MismatchWeights]] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "prefix_truncate": prefix_truncate,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}
"""``(old_logprobs, rollout_logprobs, *, mask, **bounds)`` -> weights."""


@torch.no_grad()
def _token_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (old_logprobs - rollout_logprobs).where(mask, 0.0).exp()


@torch.no_grad()
def _sequence_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    log_weights = (old_logprobs - rollout_logprobs).where(mask, 0.0).sum(-1, keepdim=True)
    return log_weights.exp(), mask.any(-1, keepdim=True)


def _truncated(weights: Tensor, counted: Tensor, *, high: float) -> MismatchWeights:
    values = weights.clamp(max=high)
    return MismatchWeights(values=values, bounded=weights > high, counted=counted, action=Action.TRUNCATED)


def _masked(weights: Tensor, counted: Tensor, *, low: float, high: float) -> MismatchWeights:
    # written so that NaN is not masked: a broken log-probability must show in the loss
    outside = (weights < low) | (weights > high)
    values = weights.masked_fill(outside, 0.0)
    return MismatchWeights(values=values, bounded=outside, counted=counted, action=Action.MASKED)
