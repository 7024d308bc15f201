"""Workers that crash, refuse, diverge: real processes under the real crew; only what a run computes is left out."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.study.crew import Crew, Todo, engine_key
from megatron_klrl.study.folder import Outcome, Start, Status, held, look, prepare, read_outcome, write_outcome
from megatron_klrl.study.plan import PlannedRun
from tests.unit.study.studies import planned, study_file

# A worker that ends each run as its cell is called, and notes who served it.
WORKER = """
import json, os, signal, sys
from pathlib import Path

folder = Path(sys.argv[1])
print("a library says something", flush=True)
for line in sys.stdin:
    run = Path(json.loads(line)["run_dir"])
    cell = run.parts[-3]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "pid": os.getpid(), **json.loads(line)}) + "\\n")
    (run / "checkpoints" / "step_000004").mkdir(parents=True, exist_ok=True)
    if cell == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if cell == "ended": sys.exit(3)
    if cell in ("user", "work", "diverged"):
        (run / "error.json").write_text(json.dumps({"kind": cell, "rank": 0, "message": "because"}))
        sys.exit(1)
    print("klrl-study " + json.dumps({"run_dir": str(run), "seconds": 1.5}), flush=True)
"""
FACTS = Outcome(status=Status.DONE, message="", seconds=0, command="", commit="c", versions="v", machine="m")


class Noted:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.ends: dict[str, Outcome] = {}
        self.not_ours: list[str] = []
        self.most = 0

    def started(self, run: PlannedRun) -> None: ...

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        self.ends[run.name] = outcome

    def elsewhere(self, run: PlannedRun) -> None:
        self.not_ours.append(run.name)

    def tick(self, running: Sequence[PlannedRun]) -> None:
        self.most = max(self.most, len(running))


def work(out: Path, runs: Sequence[PlannedRun], *, jobs: int = 1) -> Noted:
    """All runs to their end."""
    out.mkdir(exist_ok=True)
    script, seen = out / "worker.py", Noted()
    script.write_text(WORKER)
    command = (sys.executable, str(script))
    crew = Crew(out=out, jobs=jobs, facts=FACTS, keep_weights=False, observer=seen, command=command)
    crew.work([Todo(run=run, start=Start.FRESH) for run in runs])
    return seen


def pid(out: Path, run: PlannedRun) -> int:
    """Of the worker that served a run."""
    return int(json.loads((out / run.name / "metrics.jsonl").read_text())["pid"])


def cells(tmp_path: Path, *names: str) -> list[PlannedRun]:
    """One run of each cell."""
    file = study_file(tmp_path, cells={name: {} for name in names}, grid={"kl.beta": [0.1]}, seeds=[0])
    return planned(file)


def test_one_worker_serves_all_runs_of_equal_engines(tmp_path: Path) -> None:
    runs = cells(tmp_path, "a", "b", "c")
    seen = work(tmp_path / "out", runs)
    assert [end.status for end in seen.ends.values()] == [Status.DONE] * 3
    assert {end.seconds for end in seen.ends.values()} == {1.5}
    assert len({pid(tmp_path / "out", run) for run in runs}) == 1
    assert list((tmp_path / "out" / "workers").iterdir()) == [], "a worker that ended well leaves nothing"
    assert not (tmp_path / "out" / runs[0].name / "checkpoints").exists(), "weights of ended runs are not kept"


def test_whatever_becomes_of_a_run_the_others_are_done(tmp_path: Path) -> None:
    runs = cells(tmp_path, "killed", "a", "ended", "user", "b", "work", "diverged", "c")
    seen = work(tmp_path / "out", runs)
    assert {name.split("/")[0]: end.status for name, end in seen.ends.items()} == {
        "killed": Status.CRASHED,
        "a": Status.DONE,
        "ended": Status.CRASHED,
        "user": Status.REFUSED,
        "b": Status.DONE,
        "work": Status.FAILED,
        "diverged": Status.DIVERGED,
        "c": Status.DONE,
    }
    messages = {name.split("/")[0]: end.message for name, end in seen.ends.items()}
    assert messages["killed"].startswith(
        "the worker was killed by SIGKILL (often the machine is out of memory); its log"
    )
    assert messages["ended"].startswith("the worker ended with exit code 3; its log is in ")
    assert messages["user"] == messages["diverged"] == "because"
    assert all(read_outcome(tmp_path / "out" / run.name) == seen.ends[run.name] for run in runs)


def test_jobs_are_workers_at_the_same_time(tmp_path: Path) -> None:
    runs = cells(tmp_path, *"abcdef")
    seen = work(tmp_path / "out", runs, jobs=2)
    assert len(seen.ends) == 6
    assert seen.most == 2
    assert len({pid(tmp_path / "out", run) for run in runs}) <= 2


def test_other_engines_are_another_worker(tmp_path: Path) -> None:
    grid = {"generation.max_num_seqs": [16, 32], "optimizer.lr": [1e-4, 1e-3]}
    runs = planned(study_file(tmp_path, cells={"a": {}}, grid=grid, seeds=[0]))
    assert [engine_key(run) for run in runs] == [engine_key(runs[0])] * 2 + [engine_key(runs[2])] * 2
    out = tmp_path / "out"
    work(out, runs)
    assert pid(out, runs[0]) == pid(out, runs[1]) != pid(out, runs[2]) == pid(out, runs[3])


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    runs = cells(tmp_path, "a", "b")
    with held(tmp_path / "out", runs[0].name) as mine:
        assert mine
        seen = work(tmp_path / "out", runs)
    assert seen.not_ours == [runs[0].name]
    assert list(seen.ends) == [runs[1].name]
    with held(tmp_path / "out", runs[1].name) as mine:
        assert mine, "an ended run is nobody's"


def test_workers_do_not_outlive_a_study_that_breaks_off(tmp_path: Path) -> None:
    (run,) = cells(tmp_path, "a")
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    out = tmp_path / "out"

    class Impatient(Noted):
        def tick(self, running: Sequence[PlannedRun]) -> None:
            if running and list(out.glob("workers/*/pid")):
                raise KeyboardInterrupt

    command = (sys.executable, str(script))
    crew = Crew(out=out, jobs=1, facts=FACTS, keep_weights=False, observer=Impatient(), command=command)
    out.mkdir()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        crew.work([Todo(run=run, start=Start.FRESH)])
    assert time.monotonic() - start < 30
    (found,) = out.glob("workers/*/pid")
    assert not Path("/proc", found.read_text()).exists()
    assert look(out / run.name, run.recipe, retry=False) is Start.FRESH, "half a run is done again"


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    (run,) = cells(tmp_path, "a")
    folder = tmp_path / "run"
    assert look(folder, run.recipe, retry=False) is Start.FRESH
    prepare(folder, run.recipe, Start.FRESH)
    (folder / "metrics.jsonl").write_text("{}")
    assert look(folder, run.recipe, retry=False) is Start.FRESH
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    assert look(folder, run.recipe, retry=False) is Start.FRESH, "an incomplete checkpoint is none"
    (folder / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    assert look(folder, run.recipe, retry=False) is Start.RESUME
    prepare(folder, run.recipe, Start.RESUME)
    assert (folder / "metrics.jsonl").exists()
    for status, again in ((Status.DONE, Start.NOTHING), (Status.CRASHED, Start.FRESH)):
        write_outcome(folder, Outcome(**{**{f: getattr(FACTS, f) for f in FACTS.__slots__}, "status": status}))
        assert look(folder, run.recipe, retry=False) is Start.NOTHING
        assert look(folder, run.recipe, retry=True) is again
    prepare(folder, run.recipe, Start.FRESH)
    assert not (folder / "metrics.jsonl").exists(), "a fresh run finds nothing of an earlier one"


def test_a_folder_of_another_recipe_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    (run,) = cells(tmp_path, "a")
    prepare(tmp_path / "run", run.recipe, Start.FRESH)
    other = run.recipe.model_copy(update={"kl": run.recipe.kl.model_copy(update={"beta": 0.7})})
    with pytest.raises(UserError, match=r"--out: .*kl.beta 0.1, the study now says 0.7. Fix: "):
        look(tmp_path / "run", other, retry=False)
