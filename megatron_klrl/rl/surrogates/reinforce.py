"""REINFORCE."""

import torch
from torch import Tensor

from megatron_klrl.rl.surrogates.terms import SurrogateTerms


def reinforce(logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, mask: Tensor) -> SurrogateTerms:
    """Advantage times log-probability.

    Value: ``A_t log pi(y_t)``; its level means nothing.
    **Gradient**: ``A_t grad log pi(y_t)``. On-policy, and summed over each sequence, the expectation is grad E[R] (for
        advantages whose baseline leaves it so). Off-policy it is not corrected: the expectation is that of the policy
        that sampled, so a second update on the same batch is biased.
    Units: the advantage's, times nats.

    Args:
        logprobs: as in `Surrogate.terms`.
        old_logprobs: not part of the value; only its shape must fit.
        advantages: see there.
        mask: see there.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    _require_shape(old_logprobs, logprobs)
    return SurrogateTerms(values=advantages * logprobs.where(mask, 0.0), clipped=torch.zeros_like(mask))


def _require_shape(old_logprobs: Tensor, logprobs: Tensor) -> None:
    if old_logprobs.shape != logprobs.shape:
        raise ValueError(f"old_logprobs {tuple(old_logprobs.shape)} and logprobs {tuple(logprobs.shape)} differ")
