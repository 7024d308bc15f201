"""report.md, summary.csv and pictures of a study, made anew from what its folder holds."""

import csv
import io
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klrl.config.study import StudyFile
from megatron_klrl.loop.closed_form import Point, optimal_point
from megatron_klrl.study.folder import Status
from megatron_klrl.study.intervals import Interval, interval
from megatron_klrl.study.plots import draw_curves, draw_frontier
from megatron_klrl.study.results import LAST_SHARE, RunResult, in_distribution

REPORT, SUMMARY = "report.md", "summary.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cell at one point of its grid, over its seeds.

    Attributes:
        label: cell and grid values.
        point: the grid values alone.
        beta: of its objective.
        results: of its runs that have ended, in the order of the seeds.
        planned: runs of it.
    """

    label: str
    point: str
    beta: float
    results: list[RunResult]
    planned: int

    @property
    def done(self) -> list[RunResult]:
        """Runs that went to their end: means are over them, and the others are counted beside."""
        return [result for result in self.results if result.is_done]

    def over_seeds(self, name: str) -> Interval:
        """A value of the runs' end."""
        return interval([v for v in (result.values[name] for result in self.done) if not math.isnan(v)])

    def objective(self, beta: float) -> Interval:
        """accuracy - beta * kl, over seeds."""
        return interval([v for v in (result.objective(beta) for result in self.done) if not math.isnan(v)])


def write_report(study: StudyFile, file: Path, results: Sequence[RunResult], out: Path) -> Path:
    """Write everything; where the report is.

    Args:
        study: the file's content.
        file: of the study.
        results: of all its runs, those too that have not ended.
        out: folder of the study.
    """
    rows = make_rows(results)
    (out / SUMMARY).write_text(_summary(results), encoding="utf-8")
    pictures = [draw_curves(rows, out / "curves.png"), draw_frontier(rows, out / "frontier.png")]
    sections = [
        f"# {file.stem}",
        _facts(study, results, out),
        _table(rows),
        _objectives(rows),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures if picture is not None),
        _failures(results),
    ]
    (out / REPORT).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return out / REPORT


def make_rows(results: Sequence[RunResult]) -> list[Row]:
    """Runs by cell and grid point, in the order of the study file."""
    grouped: dict[str, list[RunResult]] = {}
    for result in results:
        grouped.setdefault(result.run.name.rpartition("/")[0], []).append(result)
    return [
        Row(
            label=label.replace("/", ", "),
            point=", ".join(label.split("/")[1:]),
            beta=group[0].run.recipe.kl.beta,
            results=[result for result in group if result.outcome is not None],
            planned=len(group),
        )
        for label, group in grouped.items()
    ]


def _facts(study: StudyFile, results: Sequence[RunResult], out: Path) -> str:
    outcomes = [result.outcome for result in results if result.outcome is not None]
    ended = len(outcomes)
    lines = [
        f"* {ended} of {len(results)} runs have ended; seeds {', '.join(map(str, study.seeds))}",
        f"* recipe {study.recipe}; every run's own, resolved, is its `config.yaml`: `klrl train` repeats it",
        f"* commit {_all_of(o.commit for o in outcomes)}; {_all_of(o.versions for o in outcomes)}",
        f"* {_all_of(o.machine for o in outcomes)}; {sum(o.seconds for o in outcomes) / 60:.0f} minutes of runs in all",
        f"* made by `{shlex.join(['klrl', *sys.argv[1:]])}`; runs in {out}",
    ]
    return "\n".join(lines)


def _all_of(texts: object) -> str:
    return "; ".join(dict.fromkeys(texts))  # type: ignore[call-overload]


def _table(rows: Sequence[Row]) -> str:
    sets = dict.fromkeys(name for row in rows for result in row.results for name in result.run.recipe.data.eval)
    known = next((result.run for row in rows for result in row.results), None)
    inside = in_distribution(known) if known else []
    titles = ["cell", "seeds", "reward", *(f"{name} ({'ID' if name in inside else 'OOD'})" for name in sets)]
    measured = any(not math.isnan(result.values["kl_grad_norm"]) for row in rows for result in row.done)
    titles += [
        "accuracy",
        "KL, nats",
        "J",
        "entropy",
        *(["norm of the KL's gradient"] if measured else []),
        "collapsed",
    ]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        counted = f"{len(row.done)}" if len(row.done) == row.planned else f"{len(row.done)} of {row.planned}"
        names = ["reward", *(f"accuracy/{name}" for name in sets), "accuracy", "kl"]
        cells = [_cell(row.over_seeds(name)) for name in names]
        seen = [result for result in row.results if result.is_result]
        collapsed = f"{sum(result.collapsed for result in seen)} of {len(seen)}"
        lines.append([row.label, counted, *cells, _cell(row.objective(row.beta)), _cell(row.over_seeds("entropy"))])
        lines[-1] += [_cell(row.over_seeds("kl_grad_norm"))] if measured else []
        lines[-1].append(collapsed)
    source = "new samples of the final policy"
    if not all(result.fresh for row in rows for result in row.done):
        source += " where optimum.prompts asks for them, else the last evaluation and the last steps' training samples"
    how = (
        "Means over the runs that went to their end, with 95 % intervals over seeds (Student's t). reward and entropy: "
        f"training samples of the last {LAST_SHARE:.0%} of steps; under staleness, those of older policies. Columns of "
        f"sets: last evaluation. accuracy and KL (full vocabulary, per sequence): {source}. J = accuracy - beta KL, "
        "with the cell's own beta. collapsed: diverged, or accuracy in distribution below the study's share of the "
        "untouched model's."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + how


def _objectives(rows: Sequence[Row]) -> str:
    """J of every cell at every beta of the study, best first, with the closed-form optimum."""
    betas = sorted({row.beta for row in rows if row.beta > 0})
    parts = []
    for beta in betas:
        compared = [row for row in rows if row.beta in (0, beta) and row.done]
        found = sorted(((row.objective(beta), row) for row in compared), key=lambda pair: -pair[0].mean)
        found = [(value, row) for value, row in found if not math.isnan(value.mean)]
        best = optimum(rows, beta)
        if not found:
            continue
        listed = [f"| {row.label} | {_cell(value)} |" for value, row in found]
        ceiling = [f"| *optimum, closed form* | {best.objective:.3f} |"] if best else []
        parts.append("\n".join([f"| at beta {beta:g} | J |", "|---|---|", *ceiling, *listed]))
    return "\n\n".join(["## Objective reached", *parts]) if parts else ""


def optimum(rows: Sequence[Row], beta: float) -> Point | None:
    """The closed form, over the success rates that the study's runs measured."""
    rates = [rate for row in rows for result in row.results for rate in result.reference_rates]
    return optimal_point(rates, beta=beta) if rates else None


def _failures(results: Sequence[RunResult]) -> str:
    failed = [r for r in results if r.outcome is not None and r.outcome.status is not Status.DONE]
    if not failed:
        return ""
    lines = [f"* {r.run.name}: {r.outcome.status}: {r.outcome.message}" for r in failed if r.outcome]
    return "\n".join(["## Runs without an end", "", *lines])


def _cell(value: Interval) -> str:
    if math.isnan(value.mean):
        return "-"
    digits = 3 if abs(value.mean) < 10 else 1
    half = "" if math.isnan(value.half) else f" ± {value.half:.{digits}f}"
    return f"{value.mean:.{digits}f}{half}"


def _summary(results: Sequence[RunResult]) -> str:
    keys = list(dict.fromkeys(key for result in results for key in result.run.point))
    names = list(dict.fromkeys(name for result in results for name in result.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "cell", *keys, "seed", "status", "message", "seconds", "collapsed", "beta", *names])
    for result in results:
        run, outcome = result.run, result.outcome
        ended = [outcome.status, outcome.message, outcome.seconds] if outcome else ["not ended", "", ""]
        values = [_plain(result.values.get(name, math.nan)) for name in names]
        point = [run.point.get(key, "") for key in keys]
        writer.writerow([run.name, run.cell, *point, run.seed, *ended, result.collapsed, run.recipe.kl.beta, *values])
    return text.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
