"""How the policy-gradient terms of tokens add up to one loss: weights with global denominators.

The denominators count the whole batch of the update, over all ranks and microbatches, and are known before the first
microbatch; so the loss does not depend on layout or microbatching. The entropy bonus has the same weights. The KL term
does not pass through here: it is always the sum over a sequence, averaged over sequences.
"""

from collections.abc import Callable

from torch import Tensor


def sequence_sum(mask: Tensor) -> Tensor:
    """Sum over tokens, mean over sequences: the gradient of E[R] itself (REINFORCE, RLOO)."""
    return mask.float() / mask.shape[0]


def sequence_mean(mask: Tensor) -> Tensor:
    """Mean over tokens, then mean over sequences: the GRPO paper's form; short sequences weigh more per token."""
    return mask.float() / (mask.sum(-1, keepdim=True).clamp(min=1) * mask.shape[0])


def token_mean(mask: Tensor) -> Tensor:
    """Mean over all tokens of the batch: the DAPO form; every token weighs the same."""
    return mask.float() / mask.sum().clamp(min=1)


def constant_norm(mask: Tensor, *, norm_length: int) -> Tensor:
    """Sum over tokens over a constant, mean over sequences: the Dr. GRPO form, `sequence_sum` in other units.

    Args:
        mask: ``[B, S]`` bool.
        norm_length: the constant, tokens; the longest response, where a response of that length has weight 1 / B.

    Source: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.
    """
    return mask.float() / (norm_length * mask.shape[0])


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "constant_norm": constant_norm,
}
"""``[B, S]`` bool mask of the whole batch -> ``[B, S]`` float32 weights that sum to the loss.

``constant_norm`` also takes the keyword ``norm_length``."""
