"""The reward itself."""

from torch import Tensor

from megatron_klrl.rl.advantages.groups import grouped


def reinforce(rewards: Tensor, *, group_size: int) -> Tensor:
    """No baseline.

    Value: ``R_i``.
    Gradient: times the score of the sequence, the expectation is exactly grad E[R]; with more variance than any of
        the baselines.

    Args:
        rewards: ``[B]``.
        group_size: rows per prompt; one is enough.

    Returns:
        ``[B]`` advantages.

    Raises:
        ValueError: rows do not fill groups.

    Source: Williams 1992, "Simple statistical gradient-following algorithms", Machine Learning 8.
    """
    return grouped(rewards, group_size=group_size, at_least=1).reshape(-1)
