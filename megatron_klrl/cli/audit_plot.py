"""The audit as a picture: bias against variance, on-policy and off-policy."""

from pathlib import Path
from typing import Any

from megatron_klrl.kl.audit import AuditReport, AuditRow, Measurement

_COLORS = {"reward": "tab:blue", "loss": "tab:red", "both": "tab:green"}
_MARKERS = {"k1": "o", "k2": "s", "k3": "^", "abs": "x", "exact": "D"}
_NAMED = (
    "reward/k1/to_go/none",
    "reward/k1/to_go/prefix",
    "reward/k3/to_go/none",
    "loss/k1/token/none",
    "loss/k3/token/none",
    "loss/k3/token/token",
    "both/exact/to_go/none",
    "both/exact/to_go/prefix",
)
_CROWDED = 0.35  # beyond this error a label to the right would leave the panel
_ZERO = 3e-3  # where an error of rounding size is drawn on the logarithmic axis


def plot_audit(report: AuditReport, file: Path) -> None:
    """Write the picture; the suffix of ``file`` chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, sampling in zip(panels, ("on-policy", "off-policy"), strict=True):
        for row in report.rows:
            on_policy = sampling == "on-policy"
            named = row.entry.name in _NAMED and not (on_policy and row.entry.config.correction != "none")
            _draw(axis, row, row.on_policy if on_policy else row.off_policy, named=named)
        axis.set(xscale="log", yscale="log", title=f"{sampling} samples", xlim=(_ZERO / 2, 6))
        axis.set_xlabel("relative error of the expected gradient (left edge: unbiased)")
        axis.axvspan(_ZERO / 2, 2 * _ZERO, color="tab:green", alpha=0.08)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("variance of one sample's gradient")
    _legend(panels[1])
    figure.suptitle("KL configurations against the gradient of the sequence-level KL(policy || reference)")
    figure.savefig(file, dpi=130)


def _draw(axis: Any, row: AuditRow, measured: Measurement, *, named: bool) -> None:
    config, error = row.entry.config, max(measured.sequence.relative_error, _ZERO)
    variance = max(measured.variance, 1e-3)
    axis.plot(error, variance, _MARKERS[config.estimator], color=_COLORS[config.placement], alpha=0.7, markersize=6)
    if named:
        # towards the middle of the panel, and k1 below k3, so that neighbours do not cover each other
        up = 5 if config.estimator == "k1" else -8
        aside = {"xytext": (-6, up), "ha": "right"} if error > _CROWDED else {"xytext": (6, -3)}
        axis.annotate(row.entry.name, (error, variance), textcoords="offset points", fontsize=7.5, **aside)


def _legend(axis: Any) -> None:
    for placement, color in _COLORS.items():
        axis.plot([], [], "o", color=color, label=f"in {placement}")
    for estimator, marker in _MARKERS.items():
        axis.plot([], [], marker, color="gray", label=estimator)
    axis.legend(loc="lower left", fontsize=8, ncols=2)
