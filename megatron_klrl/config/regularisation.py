"""The sections kl_control and reference of a recipe: what of the KL changes while a run goes on."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from megatron_klrl.config.fields import Count, Flag, NonNegativeNumber, Positive, PositiveNumber, Section, Text


class BetaKind(StrEnum):
    """How beta changes over a run."""

    FIXED = "fixed"
    LINEAR = "linear"
    COSINE = "cosine"
    TARGET = "target"


class KLControlSection(Section):
    """How beta goes on from kl.beta, the first step's."""

    kind: BetaKind = BetaKind.FIXED
    """fixed keeps kl.beta; linear and cosine take it to final; target steers it so that the KL becomes target, in any
    placement."""
    final: NonNegativeNumber | None = None
    """Last beta of linear and cosine, per nat."""
    steps: Positive | None = None
    """Steps that linear and cosine take; none: loop.steps."""
    target: PositiveNumber | None = None
    """KL that kind target steers to, in nats per sequence: kl/exact as it is logged."""
    gain: PositiveNumber = 0.1
    """Of kind target: share of the relative error by which beta changes in a step."""
    clip: PositiveNumber = 0.2
    """Of kind target: largest relative error that counts."""
    low: PositiveNumber = 1e-4
    """Of kind target: least beta, per nat."""
    high: PositiveNumber = 10.0
    """Of kind target: largest beta, per nat."""


class ReferenceSection(Section):
    """What the policy is held to, or with kl.beta 0 and measure only compared with."""

    path: Text | None = None
    """Hugging Face folder of a model of the same architecture; none: the model that training starts from."""
    reset_every: Count = 0
    """Steps after which the policy becomes the reference, again and again; 0: never."""
    ema: Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)] | None = None
    """Decay of a reference that follows the policy: each step, reference = ema * reference + (1 - ema) * policy. none:
    it does not follow."""

    measure: Flag = False
    """Load the reference although kl.beta is 0, so that the distance to it is known (kl/*) where nothing holds the
    policy to it; costs what a reference costs."""

    @property
    def moves(self) -> bool:
        """Whether the reference changes during the run."""
        return self.reset_every > 0 or self.ema is not None
