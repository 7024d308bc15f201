"""Advantages of the task reward. The KL is never among their inputs: see kl/surrogate.py for its side."""

from collections.abc import Callable

from torch import Tensor

GROUP_STD_EPS = 1e-6
"""Added to the standard deviation that `grpo` divides by, in units of reward."""


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
    grouped = _grouped(rewards, group_size=group_size)
    others = (grouped.sum(-1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).view(-1)


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
    grouped = _grouped(rewards, group_size=group_size)
    return (grouped - grouped.mean(-1, keepdim=True)).view(-1)


def grpo(rewards: Tensor, *, group_size: int) -> Tensor:
    """Rewards standardised within their group.

    Value: ``(R_i - mean_j R_j) / (std_j R_j + GROUP_STD_EPS)``, the standard deviation with G - 1 in its denominator; 0
        for a group whose rewards are all equal.
    Gradient: times the score of the sequence, not grad E[R]: each group is weighted by the inverse of its own standard
        deviation. For 0/1 rewards with success probability p and large groups it is the gradient of
        E[2 arcsin(sqrt(p))] over prompts. A beta beside it weighs nats against standard deviations of reward.

    Args:
        rewards: ``[B]``, siblings of one prompt next to each other.
        group_size: rows per prompt, G.

    Returns:
        ``[B]`` advantages, in standard deviations.

    Raises:
        ValueError: fewer than two rows per prompt, or rows that do not fill groups.

    Source: Shao et al. 2024, "DeepSeekMath" (GRPO), arXiv 2402.03300.
    """
    grouped = _grouped(rewards, group_size=group_size)
    centred = grouped - grouped.mean(-1, keepdim=True)
    standardised = centred / (grouped.std(-1, keepdim=True) + GROUP_STD_EPS)
    # the mean of equal rewards may be off by a rounding, which a division by almost nothing would blow up
    all_equal = grouped.amax(-1, keepdim=True) == grouped.amin(-1, keepdim=True)
    return standardised.masked_fill(all_equal, 0.0).view(-1)


def _grouped(rewards: Tensor, *, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"a baseline from siblings needs at least 2 samples per prompt, got group_size {group_size}")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fill groups of {group_size}")
    return rewards.view(-1, group_size)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}
"""``[B]`` rewards and the keyword ``group_size`` -> ``[B]`` advantages."""
