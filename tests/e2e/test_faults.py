"""What users and machines do to a run in the middle, done to real runs: what they see, what is kept, how it goes on."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_klrl.config.load import dump_recipe, load_recipe
from tests.e2e.live import LiveRun
from tests.e2e.test_train import RECIPE, klrl

SETTINGS = [
    "loop.steps=500",
    "loop.checkpoint_every=2",
    "loop.eval_every=0",
    "loop.split_gradient_every=0",
    "checkpoint.keep=2",
    "data.eval={}",
    "optimum.prompts=0",
]

# Python runs a module of this name when it starts: so vLLM fails where a device's error would come up, in one rank.
FAILING_ENGINE = """
import os, pathlib, sys, threading, time

def arm():
    name = "vllm.v1.worker.gpu_model_runner"
    while not hasattr(sys.modules.get(name), "GPUModelRunner"):
        time.sleep(0.01)
    runner = sys.modules[name].GPUModelRunner
    healthy = runner.execute_model

    def execute_model(self, *arguments, **options):
        if pathlib.Path(os.environ["KLRL_TEST_FAILS_ONCE_THERE"]).exists():
            raise RuntimeError("an illegal memory access was encountered")
        return healthy(self, *arguments, **options)

    runner.execute_model = execute_model

if os.environ.get("RANK") == "1":
    threading.Thread(target=arm, daemon=True).start()
"""

pytestmark = pytest.mark.e2e


@contextmanager
def live(
    folder: Path, *settings: str, launcher: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Iterator[LiveRun]:
    run = LiveRun(folder, RECIPE, *SETTINGS, *settings, launcher=launcher, environment=environment)
    try:
        yield run
    finally:
        run.kill()


def checkpoints(folder: Path) -> list[int]:
    """Complete ones: what a run was writing when it died stays until the next start."""
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def told(err: str) -> list[str]:
    """What the program says; libraries may say something when a process ends in the middle."""
    return [line for line in err.splitlines() if line.startswith("klrl: ")]


def marker(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "unfinished.json").read_text()))


def test_a_rank_that_stands_still_ends_the_run_with_stacks(tmp_path: Path) -> None:
    """In a run that is resumed before it has a checkpoint, and so begins anew."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_recipe(load_recipe(RECIPE)))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with live(folder, "loop.step_timeout_s=15", "--resume") as run:
        run.wait_for_step(3)
        run.rank(1).send_signal(signal.SIGSTOP)
        code, out, err = run.end()
    assert code == 1
    assert "nothing to resume" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "nothing of the earlier start is left"
    (line,) = [line for line in told(err) if "warning: resumed with" not in line]
    assert "took longer than loop.step_timeout_s = 15 s; stacks of all threads are in" in line
    assert "rank 0 in step " in line
    assert line.endswith("rank 1 wrote none: stopped, or gone with its machine")
    stacks = (folder / "stacks" / "rank0.txt").read_text()
    assert "Thread 0x" in stacks
    assert "run.py" in stacks
    assert all(step % 2 == 0 for step in checkpoints(folder))
    assert not (folder / "unfinished.json").exists()


@pytest.mark.long
def test_a_killed_rank_is_named_with_its_phase_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live(folder) as run:
        run.wait_for_step(3)
        run.rank(1).kill()
        code, _, err = run.end()
    assert code in (1, 128 + signal.SIGKILL), "1 where the other rank could still say what it saw"
    assert "Traceback" not in err
    (line,) = told(err)
    assert line.startswith("klrl: rank 1 was killed by SIGKILL (often the machine is out of memory), in step ")
    saved = checkpoints(folder)
    assert saved
    assert saved[-1] >= 2
    with live(folder, "--resume") as run:
        run.wait_for_step(saved[-1] + 3)
        run.process.send_signal(signal.SIGTERM)
        code, out, err = run.end()
    assert code == 0, out + err
    assert f"at step {saved[-1]}" in out
    assert marker(folder)["signal"] == "SIGTERM"
    assert len(checkpoints(folder)) == 3, "the two newest, and the one that was resumed from"


@pytest.mark.long
def test_an_engine_that_fails_is_named_with_its_rank_and_the_run_goes_on(tmp_path: Path) -> None:
    folder, flag, modules = tmp_path / "run", tmp_path / "fail", tmp_path / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(FAILING_ENGINE)
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {"PYTHONPATH": f"{modules}:{inherited}".rstrip(":"), "KLRL_TEST_FAILS_ONCE_THERE": str(flag)}
    with live(folder, environment=environment) as run:
        run.wait_for_step(4)
        flag.touch()
        code, _, err = run.end()
    assert code == 1
    (line,) = told(err)
    assert line.startswith("klrl: rank 1, step ")
    assert ", generate: " in line
    assert "RuntimeError: an illegal memory access was encountered (traceback in " in line
    saved = checkpoints(folder)
    assert saved
    assert all(step % 2 == 0 for step in saved)
    flag.unlink()
    with live(folder, "--resume", environment=environment) as run:
        run.wait_for_step(saved[-1] + 2)


@pytest.mark.long
def test_a_run_that_diverges_says_where_and_saves_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = klrl("train", RECIPE, *SETTINGS, "optimizer.lr=1e37", "optimizer.warmup_steps=0", "--run-dir", folder)
    assert done.returncode == 1
    (line,) = told(done.stderr)
    assert "finite" in line
    assert ", step " in line
    assert not (folder / "checkpoints").exists() or all(step < 3 for step in checkpoints(folder))
    metrics = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in metrics
    assert "Infinity" not in metrics


@pytest.mark.long
def test_under_torchrun_one_signal_to_one_rank_stops_all_with_code_0(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    with live(folder, launcher=torchrun) as run:
        run.wait_for_step(1)
        rank = run.rank(1)
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        run.rank(0).send_signal(signal.SIGUSR1)
        code, out, err = run.end()
    assert code == 0, out + err
    found = marker(folder)
    assert (found["steps"], found["signal"]) == (500, "SIGTERM")
    assert checkpoints(folder)[-1] == found["step"] == run.last_step()
    assert f"stopped at step {found['step']} of 500 by SIGTERM, checkpoint " in out
