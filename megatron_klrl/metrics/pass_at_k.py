"""pass@k and intervals over prompts, from how many samples of each prompt solved it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value: the mean.
        interval_95: lower and upper end; None where one prompt says nothing of how prompts differ.
    """

    value: float
    interval_95: tuple[float, float] | None


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that k of a prompt's samples, drawn without replacement, hold one that solves it.

    Value: 1 - C(n - c, k) / C(n, k) with n samples of which c solve, as a product so that nothing overflows. Unbiased
    for 1 - (1 - p)^k, p the probability that a sample solves; the plug-in 1 - (1 - c/n)^k is biased downwards.

    Args:
        samples: n.
        solved: c.
        k: at most n.

    Raises:
        ValueError: k is not in 1..n, or c not in 0..n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= samples or not 0 <= solved <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {solved} of them right: not defined")
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - solved + 1, samples + 1))


def powers_of_two(samples: int) -> list[int]:
    """The k's that are reported: 1, 2, 4, ... up to the number of samples."""
    return [2**exponent for exponent in range(samples.bit_length())]


def over_prompts(values: Sequence[float]) -> Estimate:
    """Mean of per-prompt values with its 95 % interval; prompts are the independent units, samples of one are not.

    Normal: mean +- 1.96 standard errors, cut to [0, 1] where all values lie there. A bootstrap over prompts gives
    nearly the same from a hundred prompts on, and has a seed to state. Where all prompts are at 0, or all at 1, both
    have no width, which is not what is known: the open end is then the exact one, 1 - 0.05^(1/n) away.

    Args:
        values: one for each prompt, at least one.
    """
    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return Estimate(value=mean, interval_95=None)
    low = high = mean
    if all(value == 0 for value in values):
        high = 1 - 0.05 ** (1 / count)
    elif all(value == 1 for value in values):
        low = 0.05 ** (1 / count)
    else:
        half = _NORMAL_95 * statistics.stdev(values) / math.sqrt(count)
        low, high = mean - half, mean + half
        if all(0 <= value <= 1 for value in values):
            low, high = max(0.0, low), min(1.0, high)
    return Estimate(value=mean, interval_95=(low, high))
