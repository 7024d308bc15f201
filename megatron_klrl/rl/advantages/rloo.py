"""REINFORCE with a leave-one-out baseline."""

from torch import Tensor

from megatron_klrl.rl.advantages.groups import grouped


def rloo(rewards: Tensor, *, group_size: int) -> Tensor:
    """Each reward less the mean of its siblings' rewards.

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
    groups = grouped(rewards, group_size=group_size)
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)
