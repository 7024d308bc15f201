"""Group relative advantages."""

from torch import Tensor

from megatron_klrl.rl.advantages.groups import grouped, standardised

GROUP_STD_EPS = 1e-6
"""Added to the standard deviation of a group, in units of reward."""


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
    return standardised(grouped(rewards, group_size=group_size), eps=GROUP_STD_EPS).view(-1)
