"""Whether a KL configuration follows the objective it states, under the sampling of a run. Imports no torch."""

from dataclasses import dataclass

from megatron_klrl.kl.axes import Correction, Objective, meaningful_axes, nearest_axes
from megatron_klrl.kl.config import KLConfig, describe_axes
from megatron_klrl.kl.expectation import expected_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a configuration does not follow its objective, and the nearest one that does.

    Attributes:
        reason: one sentence.
        nearest: same beta and objective, fewest axes changed.
    """

    reason: str
    nearest: KLConfig


def refusal(config: KLConfig, *, on_policy: bool) -> Refusal | None:
    """Why ``config`` does not follow ``config.objective`` under this sampling; None when it does.

    ``config.allow_biased`` is not looked at: the caller decides whether a refusal stops the run or is only recorded.

    Args:
        config: the run's KL section; with ``beta`` 0 nothing is applied, so nothing is refused.
        on_policy: every update uses fresh samples of exactly the policy being trained. False for stale rollouts,
            several updates per batch, or an engine whose probabilities differ from the trainer's.
    """
    if config.beta == 0.0:
        return None
    if expected_gradient(config.axes, on_policy=on_policy).follows(config.objective):
        return _refused_clamp(config) or _refused_ratio_max(config, on_policy=on_policy)
    candidates = [
        axes for axes in meaningful_axes() if expected_gradient(axes, on_policy=on_policy).follows(config.objective)
    ]
    unclamped = config.model_copy(update={"log_ratio_clamp": None, "ratio_max": None})
    nearest = unclamped.with_axes(
        nearest_axes(
            config.axes,
            candidates,
            correction_costs=_correction_costs(on_policy=on_policy),
            preferred_corrections=(Correction.NONE, Correction.TOKEN, Correction.PREFIX, Correction.SEQUENCE),
        )
    )
    return Refusal(reason=_reason(config, nearest, on_policy=on_policy), nearest=nearest)


def _refused_clamp(config: KLConfig) -> Refusal | None:
    if config.log_ratio_clamp is None:
        return None
    reason = (
        f"kl {config.name} follows the {config.objective}-level KL, but not where kl.log_ratio_clamp bends it, beyond "
        f"{config.log_ratio_clamp:g} nats"
    )
    return Refusal(reason=reason, nearest=config.model_copy(update={"log_ratio_clamp": None}))


def _refused_ratio_max(config: KLConfig, *, on_policy: bool) -> Refusal | None:
    """On-policy every ratio is 1, which no bound cuts."""
    if config.ratio_max is None or on_policy:
        return None
    reason = (
        f"kl {config.name} follows the {config.objective}-level KL, but not where kl.ratio_max cuts an importance "
        f"ratio at {config.ratio_max:g}"
    )
    return Refusal(reason=reason, nearest=config.model_copy(update={"ratio_max": None}))


def _correction_costs(*, on_policy: bool) -> dict[Correction, int]:
    """Off-policy a correction is what is missing; on-policy one in the loss is a roundabout score-function half."""
    if not on_policy:
        return dict.fromkeys(Correction, 1)
    return {Correction.NONE: 1, Correction.TOKEN: 1, Correction.PREFIX: 5, Correction.SEQUENCE: 5}


def _reason(config: KLConfig, nearest: KLConfig, *, on_policy: bool) -> str:
    sampling = "on-policy" if on_policy else "off-policy (stale rollouts, several updates per batch or engine mismatch)"
    followed = expected_gradient(config.axes, on_policy=on_policy)
    wanted = {
        Objective.SEQUENCE: "the sequence-level KL",
        Objective.TOKEN: "the token-level KL",
    }[config.objective]
    return (
        f"kl {config.name} does not follow the gradient of {wanted} {sampling}: its expected gradient is "
        f"{followed.text()}{_other_objective(config, on_policy=on_policy)}; "
        f"nearest that does: {describe_axes(nearest.axes)}"
    )


def _other_objective(config: KLConfig, *, on_policy: bool) -> str:
    other = Objective.TOKEN if config.objective is Objective.SEQUENCE else Objective.SEQUENCE
    if expected_gradient(config.axes, on_policy=on_policy).follows(other):
        return f" (exact for objective={other})"
    return ""
