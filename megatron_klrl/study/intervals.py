"""Means over seeds with 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: of the 95 % interval of that mean; NaN where one value says nothing of how they differ.
        count: of values.
    """

    mean: float
    half: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of values that are taken as independent draws of a normal distribution.

    Value: mean +- t s / sqrt(n), s the sample deviation, t the 97.5 % quantile of Student's t with n - 1 degrees of
    freedom (for more than 30 that of 30, which is a little wide). Values that are not finite are the caller's to leave
    out and count.
    """
    count = len(values)
    mean = statistics.fmean(values) if values else math.nan
    if count < 2:
        return Interval(mean=mean, half=math.nan, count=count)
    t = _T_975[min(count - 1, len(_T_975)) - 1]
    return Interval(mean=mean, half=t * statistics.stdev(values) / math.sqrt(count), count=count)
