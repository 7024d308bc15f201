"""What is read of a run: its end in numbers, and its curves. From its folder alone."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.study.folder import Outcome, Status, read_outcome
from megatron_klrl.study.plan import PlannedRun

LAST_SHARE = 0.2
"""Share of a run's steps, from its end, over which the training metrics are averaged."""
_ACCURACY = "/accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run of a study.

    Attributes:
        run: which.
        outcome: how it ended; None if it has not.
        values: of its end: reward, kl, accuracy and objective of the final policy, entropy, length, norms of
            the gradient and of its KL part, ``accuracy/<set>``; NaN where nothing was measured.
        curves: metric to (step, value), in order.
        reference_rates: success rates of the reference, prompt by prompt, where the run measured them.
        fresh: accuracy and kl are of new samples of the final policy; otherwise they are the last evaluation's and
            the training samples'.
        collapsed: it diverged, or its accuracy in distribution fell below the study's share of the untouched model's.
    """

    run: PlannedRun
    outcome: Outcome | None
    values: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    reference_rates: tuple[float, ...]
    fresh: bool
    collapsed: bool

    @property
    def is_result(self) -> bool:
        """It ran to its end or to where its training left the numbers; what was refused or crashed says nothing."""
        return self.outcome is not None and self.outcome.status in (Status.DONE, Status.DIVERGED)

    @property
    def is_done(self) -> bool:
        """It ran to its end."""
        return self.outcome is not None and self.outcome.status is Status.DONE

    def objective(self, beta: float) -> float:
        """accuracy - beta * kl of its final policy; at beta 0 the accuracy."""
        return self.values["accuracy"] - (beta * self.values["kl"] if beta > 0 else 0.0)


def read_results(out: Path, runs: Sequence[PlannedRun], *, collapse_below: float) -> list[RunResult]:
    """Every run of a study, whatever there is of it."""
    return [_read(out / run.name, run, collapse_below=collapse_below) for run in runs]


def _read(run_dir: Path, run: PlannedRun, *, collapse_below: float) -> RunResult:
    rows = _rows(run_dir / "metrics.jsonl")
    outcome = read_outcome(run_dir)
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                curves.setdefault(name, []).append((int(row["step"]), value))
    optimum = _optimum(run_dir / "optimum.json")
    values = _values(run, curves, optimum)
    diverged = outcome is not None and outcome.status is Status.DIVERGED
    return RunResult(
        run=run,
        outcome=outcome,
        values=values,
        curves=curves,
        reference_rates=tuple(optimum.get("reference_rates", ())),
        fresh=bool(optimum),
        collapsed=diverged or _has_fallen(run, curves, share=collapse_below),
    )


def _values(
    run: PlannedRun, curves: Mapping[str, list[tuple[int, float]]], optimum: dict[str, Any]
) -> dict[str, float]:
    last = {
        name: _late_mean(curves.get(metric, []), steps=run.recipe.loop.steps)
        for name, metric in (
            ("reward", "reward/mean"),
            ("kl", "kl/exact"),
            ("entropy", "policy/entropy"),
            ("length", "response/length_mean"),
            ("grad_norm", "grad/norm"),
            ("kl_grad_norm", "grad/kl_norm"),
        )
    }
    sets = {name: _last(curves.get(f"eval/{name}{_ACCURACY}", [])) for name in run.recipe.data.eval}
    found = {**last, **{f"accuracy/{name}": value for name, value in sets.items()}}
    found["kl_max"] = max((value for _, value in curves.get("kl/exact", [])), default=math.nan)
    found["accuracy"] = _mean([sets[name] for name in in_distribution(run)])
    if optimum:
        found["accuracy"], found["kl"] = optimum["reached"]["accuracy"], optimum["reached"]["kl"]
    beta = run.recipe.kl.beta
    found["objective"] = found["accuracy"] - (beta * found["kl"] if beta > 0 else 0.0)
    return found


def in_distribution(run: PlannedRun) -> list[str]:
    """Evaluation sets of what is trained."""
    return [name for name, one in run.recipe.data.eval.items() if not one.out_of_distribution]


def _has_fallen(run: PlannedRun, curves: Mapping[str, list[tuple[int, float]]], *, share: float) -> bool:
    accuracies = [curves.get(f"eval/{name}{_ACCURACY}", []) for name in in_distribution(run)]
    ends = [(curve[0][1], curve[-1][1]) for curve in accuracies if len(curve) > 1]
    return bool(ends) and _mean([last for _, last in ends]) < share * _mean([first for first, _ in ends])


def _late_mean(curve: Sequence[tuple[int, float]], *, steps: int) -> float:
    """Over the last steps of a whole run; NaN for a run that ended before."""
    return _mean([value for step, value in curve if step > (1 - LAST_SHARE) * steps])


def _last(curve: Sequence[tuple[int, float]]) -> float:
    return curve[-1][1] if curve else math.nan


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _rows(file: Path) -> list[dict[str, float]]:
    """Whole lines of a metrics file; the last may still be on its way."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]


def _optimum(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
