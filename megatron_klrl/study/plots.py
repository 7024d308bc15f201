"""The pictures of a study: curves with bands over seeds, and the frontier of accuracy against KL."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from megatron_klrl.loop.closed_form import optimal_point
from megatron_klrl.study.intervals import Interval, interval

if TYPE_CHECKING:
    from megatron_klrl.study.report import Row

_PANELS = (
    ("accuracy, in distribution", None),
    ("reward of the training samples", "reward/mean"),
    ("KL(policy || reference), nats", "kl/exact"),
    ("entropy, nats per token", "policy/entropy"),
)
_WIDE_RANGE = 30.0  # of positive values, from where a logarithmic axis shows more
_COLUMNS = 6


def draw_curves(rows: "Sequence[Row]", file: Path) -> Path | None:
    """Mean over seeds and its 95 % interval against the step: a column for each point of the grid, a row per metric."""
    rows = [row for row in rows if row.results]
    points = list(dict.fromkeys(row.point for row in rows if row.point)) or [""]
    if not rows:
        return None
    points = points[:_COLUMNS]
    colors = _colors(rows)
    size = (1.5 + 4.2 * len(points), 2.6 * len(_PANELS))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(_PANELS), len(points), squeeze=False, sharex=True, sharey="row")
    for column, point in enumerate(points):
        for (title, metric), axis in zip(_PANELS, panels[:, column], strict=True):
            for row in rows:
                if row.point in (point, ""):
                    _draw_curve(axis, row, metric, color=colors[_name(row)])
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title, fontsize=9)
        panels[0, column].set_title(point or "all cells")
        panels[-1, column].set_xlabel("step")
    for line in panels:
        _scale(line)
    _legend(figure, colors)
    figure.savefig(file, dpi=110)
    return file


def _draw_curve(axis: Any, row: "Row", metric: str | None, *, color: Any) -> None:
    steps = _by_step(row, metric)
    if not steps:
        return
    xs = list(steps)
    found = [interval(steps[x]) for x in xs]
    axis.plot(xs, [one.mean for one in found], color=color, linewidth=1.4)
    if all(one.count > 1 for one in found):
        low, high = ([one.mean + sign * one.half for one in found] for sign in (-1, 1))
        axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _by_step(row: "Row", metric: str | None) -> dict[int, list[float]]:
    """Values of all seeds at the steps that every run has; accuracy is the mean over the sets in distribution."""
    curves = []
    for result in row.results:
        inside = [name for name, one in result.run.recipe.data.eval.items() if not one.out_of_distribution]
        names = [metric] if metric else [f"eval/{name}/accuracy" for name in inside]
        parts = [dict(result.curves[name]) for name in names if name in result.curves]
        if parts:
            steps = [step for step in parts[0] if all(step in part for part in parts)]
            curves.append({step: sum(part[step] for part in parts) / len(parts) for step in steps})
    longest: dict[int, float] = max(curves, key=len, default={})
    return {step: [curve[step] for curve in curves if step in curve] for step in longest}


def draw_frontier(rows: "Sequence[Row]", file: Path) -> Path | None:
    """Accuracy against KL of the final policies, each run a dot, each cell a cross of intervals, over the optimum."""
    drawn = [row for row in rows if not math.isnan(row.over_seeds("kl").mean)]
    if not drawn:
        return None
    colors = _colors(drawn)
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axis = figure.subplots()
    several = len({row.point for row in drawn if row.point}) > 1
    for row in drawn:
        kl, accuracy, color = row.over_seeds("kl"), row.over_seeds("accuracy"), colors[_name(row)]
        axis.plot(
            [r.values["kl"] for r in row.done], [r.values["accuracy"] for r in row.done], ".", color=color, alpha=0.4
        )
        axis.errorbar(kl.mean, accuracy.mean, xerr=_bar(kl), yerr=_bar(accuracy), fmt="o", color=color, markersize=5)
        if several:
            axis.annotate(row.point, (kl.mean, accuracy.mean), xytext=(5, -9), textcoords="offset points", fontsize=6.5)
    _draw_optimum(axis, rows)
    axis.set(xlabel="KL(policy || reference), nats per sequence", ylabel="accuracy, in distribution")
    ends = [result for row in drawn for result in row.done]
    distances, accuracies = (
        [r.values[name] for r in ends if not math.isnan(r.values[name])] for name in ("kl", "accuracy")
    )
    axis.set_ylim(*_around(min(accuracies), 1.0))
    if max(distances) > _WIDE_RANGE * max(min(distances), 1e-3):
        axis.set_xscale("log")
        axis.set_xlim(max(0.5 * min(distances), 1e-3), 1.5 * max(distances))
    else:
        axis.set_xlim(*_around(0.0, max(distances)))
    axis.grid(alpha=0.3)
    _legend(figure, colors)
    figure.savefig(file, dpi=120)
    return file


def _draw_optimum(axis: Any, rows: "Sequence[Row]") -> None:
    """No policy is above this line: the optimum of every beta, from the reference's success rates."""
    rates = [rate for row in rows for result in row.results for rate in result.reference_rates]
    if not rates:
        return
    line = [optimal_point(rates, beta=10 ** (exponent / 10)) for exponent in range(-16, 11)]
    axis.plot([p.kl for p in line], [p.accuracy for p in line], "k-", linewidth=1, label="optimum, closed form")
    for beta in sorted({row.beta for row in rows if row.beta > 0}):
        best = optimal_point(rates, beta=beta)
        axis.plot(best.kl, best.accuracy, "k*", markersize=9)
        axis.annotate(f"beta {beta:g}", (best.kl, best.accuracy), xytext=(-6, 5), textcoords="offset points",
                      fontsize=7.5, ha="right")  # fmt: skip
    axis.legend(loc="lower right", fontsize=8)


def _bar(value: Interval) -> float | None:
    return None if math.isnan(value.half) else value.half


def _scale(line: Any) -> None:
    """Limits by the means: a band over two seeds may be wider than anything that was measured."""
    values = sorted(float(y) for axis in line for drawn in axis.lines for y in drawn.get_ydata() if math.isfinite(y))
    if not values:
        return
    middle = values[len(values) // 2]
    if values[0] >= 0 and values[-1] > _WIDE_RANGE * max(middle, 1e-3):
        line[0].set_yscale("log")
        line[0].set_ylim(max(values[len(values) // 20], 1e-3), 1.5 * values[-1])
    else:
        line[0].set_ylim(*_around(values[0], values[-1]))


def _around(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def _name(row: "Row") -> str:
    return row.label.split(", ")[0]


def _colors(rows: "Sequence[Row]") -> dict[str, Any]:
    names = list(dict.fromkeys(_name(row) for row in rows))
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(number) for number, name in enumerate(names)}


def _legend(figure: Figure, colors: dict[str, Any]) -> None:
    axis = figure.axes[0]
    handles = [axis.plot([], [], color=color, label=name)[0] for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
