"""The four axes of a KL configuration, which combinations of them mean something, and which one is nearest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import product


class Estimator(StrEnum):
    """What is computed at one token (see docs/kl/estimators.md)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"
    ABS = "abs"
    EXACT = "exact"


class Placement(StrEnum):
    """Which half of ``grad E[KL]`` is applied: the score-function half, the path-wise half, or both."""

    REWARD = "reward"
    LOSS = "loss"
    BOTH = "both"


class Credit(StrEnum):
    """Which tokens answer for which KL."""

    SEQUENCE = "sequence"
    TO_GO = "to_go"
    TOKEN = "token"


class Correction(StrEnum):
    """Which importance ratio takes samples of the rollout policy to the current policy."""

    NONE = "none"
    TOKEN = "token"
    PREFIX = "prefix"
    SEQUENCE = "sequence"


class Objective(StrEnum):
    """The KL whose gradient is wanted."""

    SEQUENCE = "sequence"
    TOKEN = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """One point of the grid, with or without meaning."""

    estimator: Estimator
    placement: Placement
    credit: Credit
    correction: Correction

    @property
    def name(self) -> str:
        """``placement/estimator/credit/correction``."""
        return f"{self.placement}/{self.estimator}/{self.credit}/{self.correction}"

    def without_meaning(self) -> str | None:
        """Why this combination means nothing; None when it means something."""
        if self.placement is Placement.LOSS:
            return self._without_meaning_in_loss()
        if self.estimator is Estimator.EXACT and self.credit is Credit.TOKEN:
            return (
                "the full-vocabulary KL of a position depends on its prefix only, so the token written there has no "
                "credit to take"
            )
        if self.credit is Credit.SEQUENCE and self.correction is Correction.PREFIX:
            return (
                "a term corrected by the ratio of its prefix is corrected only for the tokens of that prefix, so later "
                "tokens cannot share it"
            )
        return self._without_meaning_of_token_ratio()

    def _without_meaning_in_loss(self) -> str | None:
        if self.correction is Correction.PREFIX:
            if self.credit is Credit.TO_GO:
                return None
            return "in the loss the prefix ratio is differentiated, which makes every token answer for all later KL"
        if self.credit is Credit.TO_GO:
            return (
                "without the prefix ratio a loss differentiates each token's own term, so no token answers for later KL"
            )
        if self.credit is Credit.SEQUENCE:
            if self.estimator is not Estimator.K2:
                return "a loss is a sum of per-token terms; only k2 has a form on the sequence's log-ratio"
            if self.correction is Correction.TOKEN:
                return "k2 on the sequence's log-ratio has no per-token terms for a token ratio to weigh"
        return self._without_meaning_of_token_ratio()

    def _without_meaning_of_token_ratio(self) -> str | None:
        if self.estimator is Estimator.EXACT and self.correction is Correction.TOKEN:
            return "the full-vocabulary KL is already an expectation over the token, so a token ratio corrects nothing"
        return None


@cache
def meaningful_axes() -> tuple[Axes, ...]:
    """Every combination with meaning, in the order the catalogue prints."""
    grid = product(Placement, Estimator, Credit, Correction)
    points = (Axes(estimator=e, placement=p, credit=c, correction=r) for p, e, c, r in grid)
    return tuple(axes for axes in points if axes.without_meaning() is None)


_AXIS_COSTS: Mapping[str, int] = {"estimator": 8, "placement": 4, "credit": 2}
_PREFERRED_ESTIMATORS = (Estimator.K1, Estimator.K3, Estimator.K2, Estimator.EXACT, Estimator.ABS)
_PREFERRED_PLACEMENTS = (Placement.REWARD, Placement.BOTH, Placement.LOSS)
_PREFERRED_CREDITS = (Credit.TO_GO, Credit.TOKEN, Credit.SEQUENCE)


def nearest_axes(
    axes: Axes,
    candidates: Iterable[Axes],
    *,
    correction_costs: Mapping[Correction, int],
    preferred_corrections: tuple[Correction, ...],
) -> Axes:
    """The candidate that changes least of ``axes``.

    Changing the estimator counts most, then the placement, then the credit; ties go to the simpler, lower-variance
    choice.

    Args:
        axes: the combination that was asked for.
        candidates: what may be offered; at least one.
        correction_costs: what it costs to end at each correction when that is a change.
        preferred_corrections: breaks ties between corrections.
    """

    def distance(other: Axes) -> tuple[int, ...]:
        changed = sum(cost for axis, cost in _AXIS_COSTS.items() if getattr(axes, axis) is not getattr(other, axis))
        if other.correction is not axes.correction:
            changed += correction_costs[other.correction]
        return (
            changed,
            _PREFERRED_ESTIMATORS.index(other.estimator),
            _PREFERRED_PLACEMENTS.index(other.placement),
            preferred_corrections.index(other.correction),
            _PREFERRED_CREDITS.index(other.credit),
        )

    return min(candidates, key=distance)


def nearest_meaningful(axes: Axes) -> Axes:
    """The combination with meaning that is nearest to ``axes``."""
    return nearest_axes(
        axes,
        meaningful_axes(),
        correction_costs=dict.fromkeys(Correction, 3),
        preferred_corrections=(Correction.PREFIX, Correction.NONE, Correction.SEQUENCE, Correction.TOKEN),
    )
