"""Advantages of the task reward. The KL is never among their inputs: see kl/surrogate.py for its side."""

from torch import Tensor


def rloo(rewards: Tensor, *, group_size: int) -> Tensor:
    """REINFORCE with a leave-one-out baseline: each reward less the mean of its siblings' rewards.

    Value: ``R_i - mean_{j != i} R_j`` within the group; no division by a standard deviation.
    Gradient: times the score of the sequence, the expectation is exactly grad E[R]: the baseline does not depend on
        row i.

    Args:
        rewards: ``[B]``, siblings of one prompt next to each other.
        group_size: rows per prompt.

    Returns:
        ``[B]`` advantages.

    Raises:
        ValueError: fewer than two rows per prompt, or rows that do not fill groups.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; Ahmadian et al. 2024,
        arXiv 2402.14740.
    """
    if group_size < 2:
        raise ValueError(f"leave-one-out needs at least 2 samples per prompt, got group_size {group_size}")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fill groups of {group_size}")
    grouped = rewards.view(-1, group_size)
    others = (grouped.sum(-1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).view(-1)
