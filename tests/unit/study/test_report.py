"""The report, from folders written by hand, so that every number in it can be worked out."""

import csv
import json
import math
from pathlib import Path

import pytest

from megatron_klrl.config.study import load_study
from megatron_klrl.loop.closed_form import optimal_point
from megatron_klrl.study.folder import Outcome, Status, write_outcome
from megatron_klrl.study.intervals import interval
from megatron_klrl.study.plan import PlannedRun
from megatron_klrl.study.report import make_rows, write_report
from megatron_klrl.study.results import RunResult, read_results
from tests.unit.cli.programs import klrl_here
from tests.unit.study.studies import planned, study_file

STEPS = 10
RATES = [0.25, 0.5]
SETS = {"id": 0.5, "long": 0.25, "op": 0.25, "rev": 0.25}


def finish(
    out: Path, run: PlannedRun, *, accuracy: float, kl: float, status: Status = Status.DONE, optimum: bool = True
) -> None:
    """A run that went from 0.5 to `accuracy`, and to `kl` nats of its training samples."""
    folder = out / run.name
    folder.mkdir(parents=True)
    rows: list[dict[str, float]] = [{"step": 0, **{f"eval/{name}/accuracy": value for name, value in SETS.items()}}]
    rows += [
        {"step": step, "reward/mean": step / STEPS, "kl/exact": kl * step / STEPS, "policy/entropy": 0.1}
        for step in range(1, STEPS + 1)
    ]
    rows[-1] |= {f"eval/{name}/accuracy": accuracy for name in SETS}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if optimum:
        reached = {"accuracy": accuracy, "kl": kl + 0.5, "objective": 0.0}
        (folder / "optimum.json").write_text(json.dumps({"reached": reached, "reference_rates": RATES}))
    outcome = Outcome(
        status=status, message="why not", seconds=60, command="klrl", commit="abc", versions="v 1", machine="m"
    )
    write_outcome(folder, outcome)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, list[PlannedRun]]:
    """Two cells at beta 0.5, none, two seeds; one run of the second cell diverged, one has not ended."""
    cells = {"none": {"overrides": ["kl.beta=0"], "grid": {}}, "k1": {}, "bad": {}}
    file = study_file(tmp_path, cells=cells, grid={"kl.beta": [0.5]}, overrides=[f"loop.steps={STEPS}"])
    runs = planned(file)
    out = tmp_path / "out"
    named = {run.name: run for run in runs}
    finish(out, named["none/seed=0"], accuracy=0.9, kl=1.5)
    finish(out, named["none/seed=1"], accuracy=0.8, kl=1.5)
    finish(out, named["k1/beta=0.5/seed=0"], accuracy=0.7, kl=0.0)
    finish(out, named["k1/beta=0.5/seed=1"], accuracy=0.7, kl=0.1)
    finish(out, named["bad/beta=0.5/seed=0"], accuracy=0.1, kl=1.0, status=Status.DIVERGED)
    return file, runs


def results(small: tuple[Path, list[PlannedRun]]) -> list[RunResult]:
    """Everything read."""
    file, runs = small
    return read_results(file.parent / "out", runs, collapse_below=0.5)


def test_a_run_in_numbers(small: tuple[Path, list[PlannedRun]]) -> None:
    none = next(result for result in results(small) if result.run.name == "none/seed=0")
    assert none.values["reward"] == pytest.approx((0.9 + 1.0) / 2), "the last fifth of 10 steps is 2"
    assert none.values["accuracy"] == 0.9
    assert none.values["kl"] == 2.0, "of new samples, not of the training samples"
    assert none.values["kl_max"] == pytest.approx(1.5)
    assert none.values["objective"] == 0.9, "without a KL the objective is the reward"
    assert none.objective(0.5) == pytest.approx(0.9 - 0.5 * 2.0)
    assert none.curves["eval/id/accuracy"] == [(0, 0.5), (10, 0.9)]
    assert not none.collapsed
    assert none.fresh


def test_without_new_samples_the_last_steps_count(tmp_path: Path) -> None:
    (run, *_) = planned(study_file(tmp_path, cells={"k1": {}}, overrides=[f"loop.steps={STEPS}"]))
    finish(tmp_path / "out", run, accuracy=0.2, kl=1.0, optimum=False)
    (found,) = read_results(tmp_path / "out", [run], collapse_below=0.5)
    assert found.values["kl"] == pytest.approx((0.9 + 1.0) / 2)
    assert found.values["objective"] == pytest.approx(0.2 - 0.1 * 0.95)
    assert not found.fresh
    assert found.collapsed, "0.2 is less than half of 0.5"


def test_intervals_are_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 * 1.0 / math.sqrt(3)), "t of 2 degrees of freedom, deviation 1"
    assert math.isnan(interval([1.0]).half)
    assert math.isnan(interval([]).mean)


def test_the_report_says_what_came_out(small: tuple[Path, list[PlannedRun]]) -> None:
    file, _ = small
    out = file.parent / "out"
    text = write_report(load_study(file), file, results(small), out).read_text()
    assert "* 5 of 6 runs have ended; seeds 0, 1" in text
    assert "* commit abc; v 1" in text
    table = [line for line in text.split("## ")[0].splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table}
    half = 12.706 * 0.1 / math.sqrt(2) / math.sqrt(2)  # two values 0.1 apart: deviation 0.1 / sqrt(2)
    assert f"| 0.850 ± {half:.3f} |" in rows["none"]
    assert "| 0.550 ± 0.635 |" in rows["k1, beta=0.5"], "KL 0.5 and 0.6"
    assert "| 0 of 2 |" in rows["k1, beta=0.5"]
    assert "| 1 of 2 |" not in rows["bad, beta=0.5"]
    assert rows["bad, beta=0.5"].startswith("| bad, beta=0.5 | 0 of 2 | - |"), "a mean over nothing is none"
    assert "| 1 of 1 |" in rows["bad, beta=0.5"]
    assert "* bad/beta=0.5/seed=0: diverged: why not" in text


def test_cells_are_ranked_by_the_objective_under_the_optimum(small: tuple[Path, list[PlannedRun]]) -> None:
    file, _ = small
    text = write_report(load_study(file), file, results(small), file.parent / "out").read_text()
    ranked = text.split("## Objective reached")[1].splitlines()
    best = optimal_point(RATES, beta=0.5)
    assert ranked[2:7] == [
        "| at beta 0.5 | J |",
        "|---|---|",
        f"| *optimum, closed form* | {best.objective:.3f} |",
        "| k1, beta=0.5 | 0.425 ± 0.318 |",
        "| none | -0.150 ± 0.635 |",
    ]


def test_the_summary_has_a_row_for_every_run(small: tuple[Path, list[PlannedRun]]) -> None:
    file, _ = small
    out = file.parent / "out"
    write_report(load_study(file), file, results(small), out)
    with (out / "summary.csv").open() as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 6
    assert rows["k1/beta=0.5/seed=1"]["kl"] == "0.6"
    assert rows["k1/beta=0.5/seed=1"]["kl.beta"] == "0.5"
    assert rows["bad/beta=0.5/seed=0"]["status"] == "diverged"
    assert rows["bad/beta=0.5/seed=0"]["collapsed"] == "True"
    assert rows["bad/beta=0.5/seed=1"]["status"] == "not ended"


def test_pictures_are_drawn(small: tuple[Path, list[PlannedRun]]) -> None:
    file, _ = small
    out = file.parent / "out"
    text = write_report(load_study(file), file, results(small), out).read_text()
    for name in ("curves.png", "frontier.png"):
        assert f"]({name})" in text
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_rows_keep_the_order_of_the_file(small: tuple[Path, list[PlannedRun]]) -> None:
    assert [row.label for row in make_rows(results(small))] == ["none", "k1, beta=0.5", "bad, beta=0.5"]


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    done = klrl_here("study", study_file(tmp_path), "--report", cwd=tmp_path)
    assert done.exit_code == 1
    assert "no run of" in done.stderr
