"""How beta changes over a run: fixed, on a schedule, or steered towards a KL. Pure rules; none knows of a placement."""

import math
from dataclasses import dataclass
from typing import Protocol


class BetaRule(Protocol):
    """What beta is at a step. A rule that learns keeps what it learnt in one number, which a checkpoint holds."""

    def beta(self, step: int, learnt: float | None) -> float:
        """Beta of a step, per nat.

        Args:
            step: counts from 1.
            learnt: what ``learn`` returned after the step before; None at the start.
        """
        ...

    def learn(self, beta: float, kl: float) -> float | None:
        """What a finished step teaches; None where nothing is learnt.

        Args:
            beta: of the step.
            kl: of the policy that the step updated, nats per sequence.
        """
        ...


class _Scheduled:
    """A rule that depends on the step alone."""

    __slots__ = ()

    def learn(self, beta: float, kl: float) -> float | None:
        """Nothing."""
        del beta, kl


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(_Scheduled):
    """The same beta at every step."""

    value: float

    def beta(self, step: int, learnt: float | None) -> float:
        """See ``BetaRule.beta``."""
        del step, learnt
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(_Scheduled):
    """From ``start`` at step 1 to ``final`` at step ``steps``, straight; then ``final``."""

    start: float
    final: float
    steps: int

    def beta(self, step: int, learnt: float | None) -> float:
        """See ``BetaRule.beta``."""
        del learnt
        return self.start + (self.final - self.start) * progress(step, self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(_Scheduled):
    """From ``start`` at step 1 to ``final`` at step ``steps`` along half a cosine; then ``final``."""

    start: float
    final: float
    steps: int

    def beta(self, step: int, learnt: float | None) -> float:
        """See ``BetaRule.beta``."""
        del learnt
        return self.final + (self.start - self.final) * (1 + math.cos(math.pi * progress(step, self.steps))) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Steers the KL towards a budget: beta grows while the KL is above it and shrinks while it is below.

    ``beta <- beta (1 + gain clip(kl / target - 1, -clip, clip))``, kept in [low, high]. It multiplies, so beta stays
    positive and a factor is a factor wherever beta starts. Beta is the weight of the same KL on either side of the
    loss, so one rule does for every placement; but the objective is no longer that of one fixed beta.

    Attributes:
        start: beta of the first step, above 0.
        target: nats per sequence, above 0.
        gain: share of the relative error that beta follows in a step.
        clip: largest relative error that counts.
        low: least beta.
        high: most.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2 (log-space proportional controller, gain 0.1, clip 0.2).
    """

    start: float
    target: float
    gain: float
    clip: float
    low: float
    high: float

    def beta(self, step: int, learnt: float | None) -> float:
        """See ``BetaRule.beta``."""
        del step
        return self.start if learnt is None else learnt

    def learn(self, beta: float, kl: float) -> float | None:
        """Beta of the next step."""
        error = min(self.clip, max(-self.clip, kl / self.target - 1))
        return min(self.high, max(self.low, beta * (1 + self.gain * error)))


def progress(step: int, steps: int) -> float:
    """Share of the way from step 1 to step ``steps``, in [0, 1]."""
    return min(1.0, max(0.0, (step - 1) / max(1, steps - 1)))
