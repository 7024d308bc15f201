"""How the policy-gradient terms of tokens add up to one loss: weights with global denominators.

The denominators count the whole batch of the update, over all ranks and microbatches, and are known before the first
microbatch; so the loss does not depend on layout or microbatching. The KL term does not pass through here: it is always
the sum over a sequence, averaged over sequences.
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


AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
}
"""``[B, S]`` bool mask of the whole batch -> ``[B, S]`` float32 weights that sum to the loss."""
