"""What every surrogate takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from torch import Tensor


class Separable(StrEnum):
    """Where a loss may be cut into pieces whose losses add up to its own."""

    TOKENS = "tokens"
    SEQUENCES = "sequences"


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateTerms:
    """The terms of a surrogate, to be maximised.

    Attributes:
        values: ``[B, S]`` in units of the advantage, differentiable; zero where masked.
        clipped: ``[B, S]`` bool, tokens on whose gradient a bound acts; false where masked.
    """

    values: Tensor
    clipped: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """A surrogate with its bounds.

    Attributes:
        terms: ``(logprobs, old_logprobs, *, advantages, mask) -> SurrogateTerms``, all ``[B, S]``: the current policy
            with gradient, the policy before the update, the advantage, and a bool mask of the tokens that count.
            Any log-probability may stand where the mask is false.
        separable: where a sum of its terms may be cut.
    """

    terms: Callable[..., SurrogateTerms]
    separable: Separable

    def bounded(self, **bounds: float | None) -> "Surrogate":
        """The same surrogate with its keyword bounds filled in."""
        return replace(self, terms=partial(self.terms, **bounds))


def policy_log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``[B, S]`` log of current over old probability, with the gradient of the current; zero where masked."""
    return (logprobs - old_logprobs).where(mask, 0.0)


def crossed(ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Where a ratio has left ``[1 - clip_low, 1 + clip_high]`` on the side that its advantage drives it to."""
    above = (advantages > 0) & (ratios > 1 + clip_high)
    below = (advantages < 0) & (ratios < 1 - clip_low)
    return above | below


def acting_bound(advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The bound that a ratio meets on the side that its advantage drives it to."""
    return advantages.new_full(advantages.shape, 1 + clip_high).where(advantages > 0, 1 - clip_low)
