"""GRPO without the division by a standard deviation."""

from torch import Tensor

from megatron_klrl.rl.advantages.groups import grouped


def dr_grpo(rewards: Tensor, *, group_size: int) -> Tensor:
    """Each reward less the mean of its group, itself included.

    Value: ``R_i - mean_j R_j`` within the group; no division by a standard deviation. It is (1 - 1/G) times `rloo`.
    Gradient: times the score of the sequence, the expectation is (1 - 1/G) grad E[R]: the right direction, shorter by
        the share that row i has in its own baseline. A KL beside it keeps its full weight.

    Args:
        rewards: ``[B]``, siblings of one prompt next to each other.
        group_size: rows per prompt, G.

    Returns:
        ``[B]`` advantages.

    Raises:
        ValueError: fewer than two rows per prompt, or rows that do not fill groups.

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO), arXiv 2503.20783.
    """
    groups = grouped(rewards, group_size=group_size)
    return (groups - groups.mean(-1, keepdim=True)).view(-1)
