"""The optimum of the objective in closed form. Imports no torch: reports of studies draw it.

For a 0/1 reward the maximiser of E[R] - beta KL(policy || reference) is ref * exp(R / beta) / Z, so a prompt that the
reference answers with probability p has

    J* = beta log(1 - p + p e^{1/beta})
    accuracy* = p e^{1/beta} / (1 - p + p e^{1/beta})
    KL* = (accuracy* - J*) / beta
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a policy stands.

    Attributes:
        accuracy: mean 0/1 reward.
        kl: KL(policy || reference), nats per sequence.
        objective: accuracy - beta * kl.
    """

    accuracy: float
    kl: float
    objective: float


def optimal_point(success_rates: Sequence[float], *, beta: float) -> Point:
    """The closed form, averaged over prompts; computed in logarithms, so that a small beta does not overflow.

    Raises:
        ValueError: beta is not positive: without a KL the optimum is not unique.
    """
    if beta <= 0:
        raise ValueError("the closed-form optimum needs beta > 0")
    accuracies, objectives = [], []
    for rate in success_rates:
        failed = math.log1p(-rate) if rate < 1 else -math.inf
        solved = math.log(rate) + 1 / beta if rate > 0 else -math.inf
        top = max(failed, solved)
        log_z = top + math.log(math.exp(failed - top) + math.exp(solved - top))
        accuracies.append(math.exp(solved - log_z))
        objectives.append(beta * log_z)
    accuracy, objective = statistics.fmean(accuracies), statistics.fmean(objectives)
    return Point(accuracy=accuracy, kl=(accuracy - objective) / beta, objective=objective)
