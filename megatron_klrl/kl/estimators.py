"""Per-token estimates of KL(policy || reference): their values, and what differentiating them gives.

All take log-probabilities of the taken tokens (natural log, same shape) and return nats per token in float32, or
float64 where an input is. Nothing is clamped; `linear_tail` bounds the log-ratio when asked to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.errors import WorkError
from megatron_klrl.kl.axes import Estimator

_MAX_NAMED = 8


class NonFiniteLogprobError(WorkError, ValueError):
    """A log-probability or KL that counts is NaN or infinite."""


class KLOverflowError(WorkError, OverflowError):
    """An estimate or importance ratio exceeds what its floating-point type can hold."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log-ratio itself.

    Value: log(pi/ref). Unbiased for tokens of the policy; may be negative.
    **Gradient**: differentiated, the score s_t, whose expectation is zero: no regularisation, only noise. Detached and
        multiplied by the score of its own and all earlier tokens, the gradient of the sequence-level KL.
    Units: nats.

    Args:
        logprobs: ``[...]`` current policy.
        ref_logprobs: ``[...]`` frozen reference, same tokens.

    Raises:
        ValueError: shapes differ (broadcasting is never intended).

    Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html); gradient: Tang & Munos 2025,
        arXiv 2506.09477.
    """
    return log_ratio(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio.

    Value: log(pi/ref)^2 / 2. Biased (third order near the reference), never negative.
    **Gradient**: differentiated, k1_t s_t: in expectation the token-level reverse KL. Detached in the reward, no KL
        at all.
    Units: nats.

    Args:
        logprobs: ``[...]`` current policy.
        ref_logprobs: ``[...]`` frozen reference, same tokens.

    Raises:
        ValueError: shapes differ.

    Source: Schulman 2020; gradient: Liu et al. 2025, arXiv 2510.01555.
    """
    return log_ratio(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log-ratio with a control variate that keeps it from being negative.

    Value: r - 1 - log r with r = ref/pi. Unbiased for tokens of the policy.
    **Gradient**: differentiated, (1 - r_t) s_t: in expectation the per-position *forward* KL(ref || pi) on the visited
        prefixes. Detached in the reward, the reverse KL minus that. Both halves together: the reverse KL.
    Units: nats. Numerics: ``expm1`` keeps it exact near zero; it grows like exp(log ref - log pi).

    Args:
        logprobs: ``[...]`` current policy.
        ref_logprobs: ``[...]`` frozen reference, same tokens.

    Raises:
        ValueError: shapes differ.
        KLOverflowError: exp overflows; the message names the tokens.

    Source: Schulman 2020; gradient: arXiv 2512.21852, section 3.
    """
    difference = log_ratio(logprobs, ref_logprobs)
    values = torch.expm1(-difference) + difference
    require_representable(values, lambda: difference, what="k3")
    return values


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The absolute log-ratio.

    Value: |log(pi/ref)|. Biased upwards: first order in the distance, where the KL is second order.
    **Gradient**: differentiated, sign(k1_t) s_t; in the reward, |k1_t| times the score. Neither is a KL's.
    Units: nats.

    Args:
        logprobs: ``[...]`` current policy.
        ref_logprobs: ``[...]`` frozen reference, same tokens.

    Raises:
        ValueError: shapes differ.

    Source: shipped by verl and SkyRL as ``abs``; no published analysis.
    """
    return log_ratio(logprobs, ref_logprobs).abs()


SAMPLED_ESTIMATORS = {Estimator.K1: k1, Estimator.K2: k2, Estimator.K3: k3, Estimator.ABS: absolute}
"""Estimators that need the taken token's log-probabilities only."""

_SLOPES = {
    Estimator.K1: torch.ones_like,
    Estimator.K2: lambda ratio: ratio,
    Estimator.K3: lambda ratio: -torch.expm1(-ratio),
    Estimator.ABS: torch.sign,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTail:
    """Estimates whose log-ratio is bounded.

    Attributes:
        values: same shape as the log-probabilities, nats; zero where masked.
        fraction: share of the tokens that count whose log-ratio lies beyond the bound; 0-dimensional.
    """

    values: Tensor
    fraction: Tensor


def linear_tail(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: Estimator, bound: float
) -> LinearTail:
    """An estimator that goes on along its tangent where the log-ratio leaves ``[-bound, bound]``.

    Value: the estimator inside the bound; outside, its first-order continuation, so that nothing overflows.
    **Gradient**: the estimator's at the bound, for every token beyond it. ``torch.clamp`` would end it there, exactly
        where the drift is largest. Beyond the bound neither value nor gradient is the estimator's: report ``fraction``.
    Units: nats.

    Args:
        logprobs: ``[...]`` current policy.
        ref_logprobs: ``[...]`` frozen reference, same tokens.
        mask: ``[...]`` bool; what else stands there does not matter.
        estimator: k1 and abs are straight already and come back unchanged.
        bound: nats, above 0.

    Raises:
        ValueError: shapes differ, ``bound`` is not above 0, or the estimator is ``exact``.

    Source: first-order continuation of a convex penalty (Huber 1964), applied to the log-ratio.
    """
    estimate, slope = SAMPLED_ESTIMATORS.get(estimator), _SLOPES.get(estimator)
    if estimate is None or slope is None:
        raise ValueError("linear_tail: exact has no sampled log-ratio to bound; use k1, k2, k3 or abs")
    if not bound > 0.0:
        raise ValueError(f"linear_tail: bound must be above 0 nats, is {bound}")
    if mask.shape != logprobs.shape:
        raise ValueError(f"linear_tail: mask has shape {tuple(mask.shape)}, logprobs {tuple(logprobs.shape)}")
    difference = log_ratio(logprobs.where(mask, 0.0), ref_logprobs.where(mask, 0.0))
    inside = difference.detach().clamp(-bound, bound)
    beyond = (difference.detach().abs() > bound) & mask
    tail = estimate(inside, torch.zeros_like(inside)) + slope(inside) * (difference - inside)
    straight = estimate(difference.where(~beyond, 0.0), torch.zeros_like(difference))
    values = torch.where(beyond, tail, straight)
    return LinearTail(values=values, fraction=beyond.sum() / mask.sum().clamp(min=1))


def log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``logprobs - ref_logprobs`` in float32, or float64 where an input is; raises ValueError when shapes differ."""
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"ref_logprobs has shape {tuple(ref_logprobs.shape)}, logprobs {tuple(logprobs.shape)}; they must be equal"
        )
    dtype = working_dtype(logprobs, ref_logprobs)
    return logprobs.to(dtype) - ref_logprobs.to(dtype)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_representable(values: Tensor, made_of: Callable[[], Tensor], *, what: str) -> None:
    """Raises when ``values`` are not finite where the log-ratios they were made of are: they overflowed.

    Args:
        values: any shape.
        made_of: gives the log-ratios, of the same shape; called only where a value may not be finite.
        what: the values are, for the message.

    Raises:
        KLOverflowError: names the indices and the largest log-ratio there.
    """
    if _sums_to_finite(values):
        return
    log_ratios = made_of()
    bad = ~torch.isfinite(values) & torch.isfinite(log_ratios)
    if not bool(bad.any()):
        return
    worst = log_ratios.detach()[bad].abs().max().item()
    dtype = str(values.dtype).removeprefix("torch.")
    raise KLOverflowError(
        f"{what} overflows {dtype} at {named_indices(bad)}: log-ratio of {worst:.4g} nats; the policy has left the "
        "reference or the rollout policy there (kl.ratio_max bounds an importance ratio, kl.log_ratio_clamp k2 and k3)"
    )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises when a tensor holds NaN or infinity.

    Raises:
        NonFiniteLogprobError: names the tensor and the indices.
    """
    if all(_sums_to_finite(tensor) for tensor in tensors.values()):
        return
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise NonFiniteLogprobError(f"{name} is NaN or infinite at {named_indices(bad)}, where the mask is true")


def _sums_to_finite(values: Tensor) -> bool:
    """True only if every value is finite: NaN and infinity never leave a sum.

    A sum may overflow by itself, so False settles nothing. One pass and no tensor of flags.
    """
    return bool(torch.isfinite(values.detach().sum()))


def named_indices(bad: Tensor) -> str:
    """The first few indices at which ``bad`` is true, as text."""
    places = [tuple(place) for place in bad.nonzero().tolist()]
    more = len(places) - _MAX_NAMED
    text = ", ".join(str(list(place)) for place in places[:_MAX_NAMED])
    return f"[sequence, token] {text}" + (f" and {more} more" if more > 0 else "")
