"""Rewards as groups of siblings."""

from torch import Tensor


def grouped(rewards: Tensor, *, group_size: int, at_least: int = 2) -> Tensor:
    """``[B]`` as ``[B / group_size, group_size]``, siblings of one prompt in a row.

    Raises:
        ValueError: fewer rows per prompt than needed, or rows that do not fill groups.
    """
    if group_size < at_least:
        raise ValueError(
            f"a baseline from siblings needs at least {at_least} samples per prompt, got group_size {group_size}"
        )
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fill groups of {group_size}")
    return rewards.view(-1, group_size)


def standardised(values: Tensor, *, eps: float) -> Tensor:
    """Each row less its mean, over its standard deviation (n - 1 in the denominator) plus ``eps``.

    A row of equal values is 0: its mean may be off by a rounding, which a division by almost nothing would blow up.
    """
    centred = values - values.mean(-1, keepdim=True)
    all_equal = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return (centred / (values.std(-1, keepdim=True) + eps)).masked_fill(all_equal, 0.0)
