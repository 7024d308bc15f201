"""The recipe's ``kl:`` section. Imports no torch, so that a login node can check a recipe."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_klrl.kl.axes import Axes, Correction, Credit, Estimator, Objective, Placement, nearest_meaningful

__all__ = ["Correction", "Credit", "Estimator", "KLConfig", "Objective", "Placement"]


CLAMPABLE = (Estimator.K2, Estimator.K3)
"""Estimators that bend away from their tangent, so that a bound on the log-ratio changes them."""


class KLConfig(BaseModel):
    """What keeps the policy near the reference: ``max E[R] - beta * KL(policy || reference)``.

    Raises:
        ValueError: the combination of estimator, placement, credit and correction means nothing; the message names the
            nearest combination that does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    beta: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    """Weight of the stated objective's KL, per nat; the same in every placement, aggregation and layout. 0 turns the KL
    off and loads no reference."""

    objective: Objective = Objective.SEQUENCE
    """The KL whose gradient must be followed: ``sequence`` is KL(policy || reference) over whole responses; ``token``
    is the sum of per-position KLs with the visited prefixes held fixed, which ignores that a token changes later
    states."""

    estimator: Estimator = Estimator.K1
    """What is computed per token: ``k1`` log(policy/ref), ``k2`` half its square, ``k3`` r - 1 - log r with r =
    ref/policy, ``abs`` its absolute value, ``exact`` the KL over the full vocabulary."""

    placement: Placement = Placement.REWARD
    """``reward``: detached, multiplied by the score. ``loss``: differentiated. ``both``: the full beta on each side."""

    credit: Credit = Credit.TO_GO
    """Which tokens answer for which KL: all of the sequence, each for its own and all later KL, or each for its own. In
    the loss it is ``token``; ``to_go`` with the prefix correction; ``sequence`` for k2 on the sequence's log-ratio."""

    correction: Correction = Correction.NONE
    """Importance ratio policy/rollout policy, for stale or mismatched rollouts: of the token, of the prefix up to it,
    or of the whole sequence."""

    log_ratio_clamp: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Bound on the log-ratio of k2 and k3, in nats: beyond it they go on along their tangent, so that a far token
    keeps a gradient; ``kl/clamp_fraction`` is logged. None clamps nothing."""

    ratio_max: float | None = Field(default=None, ge=1.0, allow_inf_nan=False)
    """Largest value of the correction's importance ratio: above it a term counts with this weight, its direction kept,
    and ``kl/ratio_truncated_fraction`` says how often. Biased by what it cuts. None cuts nothing."""

    allow_biased: bool = False
    """Run although the configuration does not follow the stated objective under the run's sampling."""

    @property
    def axes(self) -> Axes:
        """The four axes that name a catalogue row."""
        return Axes(estimator=self.estimator, placement=self.placement, credit=self.credit, correction=self.correction)

    @property
    def name(self) -> str:
        """``placement/estimator/credit/correction``."""
        return self.axes.name

    def with_axes(self, axes: Axes) -> "KLConfig":
        """The same beta and objective at another point of the grid."""
        return KLConfig(
            beta=self.beta,
            objective=self.objective,
            estimator=axes.estimator,
            placement=axes.placement,
            credit=axes.credit,
            correction=axes.correction,
            log_ratio_clamp=self.log_ratio_clamp if axes.estimator in CLAMPABLE else None,
            ratio_max=self.ratio_max if axes.correction is not Correction.NONE else None,
            allow_biased=self.allow_biased,
        )

    @model_validator(mode="after")
    def _clamp_has_an_effect(self) -> Self:
        if self.log_ratio_clamp is not None and self.estimator not in CLAMPABLE:
            raise ValueError(
                f"kl.log_ratio_clamp has no effect on estimator {self.estimator}, which is straight beyond any bound "
                "or has no sampled log-ratio; leave it out, or use k2 or k3"
            )
        return self

    @model_validator(mode="after")
    def _ratio_max_has_an_effect(self) -> Self:
        if self.ratio_max is not None and self.correction is Correction.NONE:
            raise ValueError(
                "kl.ratio_max has no effect with correction none, which has no ratio; leave it out, or set "
                "kl.correction to token, prefix or sequence"
            )
        return self

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        reason = self.axes.without_meaning()
        if reason is None:
            return self
        nearest = nearest_meaningful(self.axes)
        raise ValueError(
            f"kl: {self.name} (placement/estimator/credit/correction) means nothing: {reason}. "
            f"Nearest with meaning: {describe_axes(nearest)}"
        )


def describe_axes(axes: Axes) -> str:
    """The axes as recipe keys."""
    return f"placement={axes.placement}, estimator={axes.estimator}, credit={axes.credit}, correction={axes.correction}"
