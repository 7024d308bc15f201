"""The loss that every contestant computes: clipped policy gradient plus 0.04 k3, mean over tokens, written once.

Trainers keep this formula in the trainer, not in a function of its own, so what is compared is the way to the
log-probabilities and back; the formula between is the same code for all. (Liger's losses contain it; parity says that
it is the same one.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 0.2
BETA = 0.04
# Old log-probabilities are one of these away from the new ones, so far from the clip's log(0.8) and log(1.2) that no
# rounding moves a token to the other side: otherwise one token would decide whether two libraries agree.
_DRIFTS = (-0.4, 0.0, 0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the loss compares log-probabilities with.

    Attributes:
        old_logprobs: ``[B, T]`` float32.
        ref_logprobs: ``[B, T]`` float32.
        advantages: ``[B]`` float32, one per sequence.
    """

    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor

    @staticmethod
    def near(logprobs: Tensor, generator: torch.Generator) -> "PolicyTargets":
        """Targets around the policy's own ``[B, T]`` log-probabilities."""
        device, shape = logprobs.device, logprobs.shape
        drifts = torch.tensor(_DRIFTS, device=device)
        chosen = torch.randint(len(_DRIFTS), shape, generator=generator, device=device)
        jitter = torch.randn(shape, generator=generator, device=device)
        distance = torch.randn(shape, generator=generator, device=device)
        return PolicyTargets(
            old_logprobs=(logprobs - drifts[chosen] - 0.02 * jitter).float(),
            ref_logprobs=(logprobs + 0.3 * distance).float(),
            advantages=torch.randn(shape[0], generator=generator, device=device),
        )


def policy_loss(logprobs: Tensor, targets: PolicyTargets, *, rows: slice = slice(None)) -> Tensor:
    """Mean over all tokens; with ``rows``, the share of these tokens of the flattened batch, to be summed.

    Args:
        logprobs: ``[B, T]``, or ``[n]`` of the tokens in ``rows``; their precision is kept above float32.
        targets: of the whole batch.
        rows: slice of the flattened tokens.
    """
    shape = targets.old_logprobs.shape
    old, ref = targets.old_logprobs.reshape(-1)[rows], targets.ref_logprobs.reshape(-1)[rows]
    advantages = targets.advantages.unsqueeze(-1).expand(shape).reshape(-1)[rows]
    current = logprobs.reshape(-1)
    ratio = torch.exp(current - old)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    distance = ref - current
    penalty = torch.exp(distance) - distance - 1
    return (BETA * penalty - surrogate).sum() / shape.numel()
