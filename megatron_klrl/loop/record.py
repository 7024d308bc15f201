"""What a run leaves in its directory, written by rank 0 alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_klrl.config.load import settings
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.kl.audit import audit_configuration
from megatron_klrl.kl.config import KLConfig
from megatron_klrl.loop import frontier
from megatron_klrl.loop.closed_form import Point
from megatron_klrl.loop.details import Details
from megatron_klrl.loop.optimum import OptimumReport
from megatron_klrl.metrics.names import known
from megatron_klrl.tracking.card import Card
from megatron_klrl.tracking.console import RunConsole
from megatron_klrl.tracking.jsonl import MetricsFile, write_samples
from megatron_klrl.tracking.tensorboard import TensorBoardWriter

_COMPARED = (
    *(f"kl.{key}" for key in ("beta", "objective", "estimator", "placement", "credit", "correction", "ratio_max")),
    *(f"algorithm.{key}" for key in ("advantage", "surrogate", "aggregation")),
    *("kl_control.kind", "reference.reset_every", "reference.ema", "mismatch.correction", "optimizer.lr"),
    *(f"loop.{key}" for key in ("prompts_per_step", "group_size", "updates_per_batch", "max_staleness", "seed")),
)
"""Keys by which TensorBoard's table tells runs apart; all others are in config.yaml."""


class RunRecord:
    """metrics.jsonl, tensorboard/, rollouts/, card.md and the terminal."""

    def __init__(self, run_dir: Path, *, first_step: int, console: RunConsole) -> None:
        """Open the files of a run.

        Args:
            run_dir: of the run.
            first_step: finished steps; what an earlier start wrote after them is replaced, at 0 all of it.
            console: of rank 0.
        """
        self.run_dir, self.console = run_dir, console
        begun = (run_dir / "metrics.jsonl").exists()
        first = first_step + 1 if first_step else 0
        self._file = MetricsFile(run_dir / "metrics.jsonl", keep_before=first)
        purge = first if begun else None
        self._last: dict[str, float] = {}
        self._board = TensorBoardWriter(run_dir / "tensorboard", purge_step=purge)

    def step(self, step: int, values: Mapping[str, float], evaluation: Mapping[str, float]) -> None:
        """One finished step, 1-based, with the evaluation of the policy after it, if there was one."""
        merged = {**values, **evaluation}
        unknown = [name for name in merged if not known(name)]
        if unknown:
            raise WorkError(f"metrics without a definition in metrics/names.py: {unknown}")
        self._file.write(step, merged)
        self._board.write(step, merged)
        self._last |= merged
        if values:
            self.console.step(step, values)
        if evaluation:
            self.console.evaluation(step, evaluation)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A few samples of one step."""
        write_samples(self.run_dir / "rollouts" / f"step_{step:06d}.jsonl", samples)

    def details(self, step: int, found: Details) -> None:
        """What TensorBoard shows of a step beside its scalars."""
        for tag, values in found.histograms.items():
            self._board.histogram(tag, values, step=step)
        for tag, heights in found.profiles.items():
            self._board.profile(tag, heights, step=step)
        for tag, text in found.texts.items():
            self._board.text(tag, text, step=step)

    def settings(self, recipe: Recipe) -> None:
        """The recipe's keys that runs are told apart by, for TensorBoard's table of runs."""
        values = {
            path: value if isinstance(value, bool | int | float | str) else str(value)
            for path, value in settings(recipe)
            if path in _COMPARED
        }
        names = ("reward/mean", "kl/exact", "objective/mean", *(f"eval/{name}/accuracy" for name in recipe.data.eval))
        self._board.settings(values, results={name: self._last[name] for name in names if name in self._last})

    def frontier(self, reference_rates: Sequence[float], *, beta: float, step: int) -> None:
        """Reward against KL over the run, as a picture in TensorBoard; nothing where no KL was measured."""
        trail = frontier.read_trail(self.run_dir / "metrics.jsonl")
        if trail:
            self._board.figure("frontier", frontier.draw(trail, reference_rates=reference_rates, beta=beta), step=step)

    def card(self, card: Card, *, step: int) -> None:
        """The run card, on disk and in TensorBoard; written at the start and again with the results."""
        text = card.render()
        (self.run_dir / "card.md").write_text(text)
        self._board.text("card", text, step=step)

    def audit(self, config: KLConfig) -> None:
        """The expected gradient of this run's KL configuration, by enumeration with the code that trained."""
        row = audit_configuration(config)
        (self.run_dir / "audit.json").write_text(json.dumps(row.to_dict(), indent=2) + "\n")

    def optimum(self, report: OptimumReport) -> None:
        """Reached and optimal side by side, on disk and on the terminal."""
        (self.run_dir / "optimum.json").write_text(json.dumps(as_json(report), indent=2) + "\n")
        for line in optimum_lines(report):
            self.console.say(line)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._board.close()


def as_json(report: OptimumReport) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "beta": report.beta,
        "prompts": report.prompts,
        "samples": report.samples,
        "unsolved": report.unsolved,
        "start": _point(report.start),
        "reached": _point(report.reached),
        "optimal": None if report.optimal is None else _point(report.optimal),
        "reference_rates": list(report.reference_rates),
    }


def point_text(point: Point) -> str:
    """One line for the run card."""
    return f"accuracy {point.accuracy:.3f}, KL {point.kl:.3f} nats, J {point.objective:.3f}"


def _point(point: Point) -> dict[str, float]:
    return {"accuracy": point.accuracy, "kl": point.kl, "objective": point.objective}


def optimum_lines(report: OptimumReport) -> list[str]:
    """A small table for the terminal."""
    lines = [
        f"[bold]J = E\\[R] - {report.beta:g} KL(policy || reference) on {report.prompts} x {report.samples} samples",
        f"{'':>22}{'accuracy':>10}{'KL nats':>10}{'J':>10}",
    ]
    rows = [("start (reference)", report.start), ("reached", report.reached)]
    if report.optimal is not None:
        rows.append(("optimum, closed form", report.optimal))
    lines += [f"{name:>22}{p.accuracy:>10.3f}{p.kl:>10.3f}{p.objective:>10.3f}" for name, p in rows]
    if report.unsolved:
        lines.append(f"  ({report.unsolved} prompts were never solved by the reference: their optimum counts as 0)")
    return lines
