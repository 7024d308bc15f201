"""What a check found, in words and numbers."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Of one check."""

    HOLDS = "holds"
    FAILS = "does not hold"
    REPORTED = "reported"  # a number without a bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a report.

    Attributes:
        name: what was checked.
        found: the numbers, as text.
        wanted: what they must be, as text.
        verdict: whether they are.
        numbers: the same for machines.
    """

    name: str
    found: str
    wanted: str
    verdict: Verdict
    numbers: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All checks of one command.

    Attributes:
        subject: what was looked at, as a sentence.
        facts: what it was done with.
        checks: in the order they were made.
    """

    subject: str
    facts: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [check.name for check in self.checks if check.verdict is Verdict.FAILS]

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return not self.failures


def verdict(holds: bool) -> Verdict:  # noqa: FBT001  the one thing a verdict is made of
    """Of a check with a bound."""
    return Verdict.HOLDS if holds else Verdict.FAILS
