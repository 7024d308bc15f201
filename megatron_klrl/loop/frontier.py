"""A run's way through reward and KL, as a picture: what each nat bought, under what is possible."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from megatron_klrl.loop.closed_form import optimal_point


def read_trail(metrics: Path) -> list[tuple[float, float]]:
    """(KL, reward) of every step that has both, from a run's metrics file."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line]
    return [(row["kl/exact"], row["reward/mean"]) for row in rows if "kl/exact" in row and "reward/mean" in row]


def draw(trail: Sequence[tuple[float, float]], *, reference_rates: Sequence[float], beta: float) -> Figure:
    """Reward against KL of the training samples, step by step, and the optimum of every beta where it is known.

    Args:
        trail: (KL, reward), in the order of the steps; not empty.
        reference_rates: success rates of the reference, prompt by prompt; empty where unknown.
        beta: of the run, whose own optimum is marked; 0 has none.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    kl, reward = zip(*trail, strict=True)
    colors = colormaps["viridis"]([step / len(trail) for step in range(len(trail))])
    axis.plot(kl, reward, "-", color="0.8", linewidth=1)
    axis.scatter(kl, reward, c=colors, s=14, label="steps, first dark to last light")
    if reference_rates:
        line = [optimal_point(reference_rates, beta=10 ** (exponent / 10)) for exponent in range(-16, 11)]
        axis.plot([point.kl for point in line], [point.accuracy for point in line], "k-", label="optimum, closed form")
        if beta > 0:
            best = optimal_point(reference_rates, beta=beta)
            axis.plot(best.kl, best.accuracy, "k*", markersize=10, label=f"at beta {beta:g}")
    axis.set(xlabel="KL(policy || reference), nats per sequence", ylabel="reward")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    return figure
