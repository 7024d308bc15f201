"""Two processes as ranks: one hangs, the other is stopped by a signal, or both hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import sys, time
from pathlib import Path
from megatron_klrl.runtime.step_bound import StepBound

folder, rank, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def fail(reason):
    (folder / f"reason{rank}").write_text(reason)

def a_collective_that_hangs():
    time.sleep(60)

bound = StepBound(folder, rank=rank, ranks=2, timeout_s=1.0, place=lambda: name, fail=fail, settle_s=1.0)
with bound:
    for step in range(4):
        bound.begin(f"step {step}")
        time.sleep(0.4)  # all four take longer than the bound, each of them does not
    bound.begin("step 4")
    (folder / f"hangs{rank}").touch()
    a_collective_that_hangs()
"""


def start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    name = f"step 4, {('generate', 'train')[rank]}"
    return subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank), name])


@pytest.mark.parametrize("fate", ["hangs", "is stopped"])
def test_a_step_without_end_leaves_stacks_and_ends_every_rank(tmp_path: Path, fate: str) -> None:
    stopped = fate == "is stopped"
    ranks = [start(tmp_path, rank) for rank in (0, 1)]
    try:
        while stopped and not (tmp_path / "hangs1").exists():
            time.sleep(0.01)
        if stopped:
            os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(timeout=30) == 1
        if not stopped:
            assert ranks[1].wait(timeout=30) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    stacks = (tmp_path / "stacks" / "rank0.txt").read_text()
    assert "a_collective_that_hangs" in stacks
    assert stacks.splitlines()[0] == "step 4, generate"
    reason = (tmp_path / "reason0").read_text()
    assert reason.startswith("step 4 took longer than loop.step_timeout_s = 1 s; stacks of all threads are in ")
    other = "rank 1 wrote none: stopped, or gone with its machine" if stopped else "rank 1 in step 4, train"
    assert reason.endswith(f"rank 0 in step 4, generate; {other}")
    assert (tmp_path / "stacks" / "rank1.txt").exists() is not stopped


def test_work_within_the_bound_is_left_alone(tmp_path: Path) -> None:
    body = RANK.replace("    a_collective_that_hangs()\n", "")
    done = subprocess.run([sys.executable, "-c", body, str(tmp_path), "0", "x"], timeout=30, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "stacks").exists()
