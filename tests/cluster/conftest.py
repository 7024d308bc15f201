"""One real SLURM cluster for all tests here: three nodes in namespaces of their own, on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
STUB = Path(__file__).with_name("stub_trainer.py")
RECIPE = ROOT / "examples" / "recipes" / "arithmetic_cpu.yaml"
NODES = 3
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "unshare", "nsenter")
LEFT_OUT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "KLRL_RUN_DIR", "PYTEST_CURRENT_TEST"}


@dataclass(frozen=True)
class SlurmCluster:
    """What tests do with the cluster.

    Attributes:
        state: folder of its daemons.
        work: folder that jobs are submitted from.
    """

    state: Path
    work: Path

    def run(self, *command: str | Path, timeout_s: float = 60, check: bool = True) -> str:
        """Run a command on the head; its standard output."""
        env = {name: value for name, value in os.environ.items() if name not in LEFT_OUT and "SLURM" not in name}
        argv = [str(SCRIPT), "exec", str(self.state), *map(str, command)]
        env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        done = subprocess.run(
            argv, cwd=self.work, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check:
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def node(self, verb: str, name: str, *command: str) -> str:
        """Crash a node, boot it, or run a command on it."""
        argv = [str(SCRIPT), verb, str(self.state), name, *command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout

    def launch(self, *arguments: str | Path) -> str:
        """Submit with `klrl launch slurm`; the job id."""
        command = [sys.executable, "-m", "megatron_klrl.cli", "launch", "slurm", *map(str, arguments), "--json"]
        return str(json.loads(self.run(*command, timeout_s=120))["job_id"])

    def job(self, job_id: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state_of(self, job_id: str) -> str:
        """Its state, such as RUNNING."""
        return self.job(job_id)["JobState"]

    def until_state(self, job_id: str, *states: str, timeout_s: float = 60) -> None:
        """Wait for a state. A requeued job waits for its old credential to expire, ten seconds on this cluster."""
        self.until(
            lambda: self.state_of(job_id) in states,
            f"job {job_id} in {states}: {self.job(job_id)}",
            timeout_s=timeout_s,
        )

    def until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 60) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{self.run('squeue')}{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """What the jobs wrote lately."""
        files = sorted(self.work.rglob("job-*.out"), key=lambda file: file.stat().st_mtime)[-2:]
        return "\n".join(f"{file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """The cluster; its end is the end of one process, however the tests end."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        pytest.skip("needs root: nodes have namespaces of their own")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2")
    # Short: the path of a socket has 107 characters. Open: munge wants folders that all can pass through.
    top = Path(tempfile.mkdtemp(prefix="klrl-slurm-"))
    top.chmod(0o755)
    state, work = top / "state", top / "work"
    work.mkdir()
    subprocess.run([str(SCRIPT), "up", str(state), str(NODES)], check=True, timeout=60)
    try:
        yield SlurmCluster(state=state, work=work)
    finally:
        subprocess.run([str(SCRIPT), "down", str(state)], check=False, timeout=30)
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture(scope="session")
def stub_venv(slurm: SlurmCluster) -> Path:
    """A virtual environment whose Python is the stub trainer, whatever it is asked to run."""
    program = slurm.work / "stub" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
    program.chmod(0o755)
    return program.parents[1]


def stub_cluster(venv: Path, *, steps: int) -> dict[str, object]:
    """A cluster file for two nodes with the stub trainer."""
    sizes = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1}
    return {**sizes, "venv": str(venv), "environment": {"STUB_STEPS": str(steps)}}


@pytest.fixture
def stub_job(slurm: SlurmCluster, stub_venv: Path, tmp_path: Path) -> Callable[..., "StubJob"]:
    """Submits a training whose trainer is the stub."""

    def submit(name: str, *arguments: str, steps: int = 10**6, **settings: object) -> StubJob:
        folder = slurm.work / name
        file = tmp_path / "cluster.yaml"
        file.write_text(json.dumps({**stub_cluster(stub_venv, steps=steps), **settings}))
        job_id = slurm.launch(RECIPE, "--cluster", file, "--run-dir", folder, *arguments)
        return StubJob(slurm=slurm, job_id=job_id, folder=folder)

    return submit


@dataclass(frozen=True)
class StubJob:
    """A job of the stub trainer."""

    slurm: SlurmCluster
    job_id: str
    folder: Path

    def notes(self) -> list[str]:
        """What its processes wrote down."""
        file = self.folder / "notes.txt"
        return file.read_text().splitlines() if file.exists() else []

    def starts(self) -> int:
        """Starts of the trainer, on any node."""
        return len({line.split()[2] for line in self.notes()})

    def log(self) -> str:
        """What the batch script wrote."""
        return "".join(file.read_text() for file in (self.folder / "slurm").glob("job-*.out"))

    def training(self, *, starts: int = 1) -> None:
        """Wait until it trains for the n-th time, and has done some steps."""
        slurm = self.slurm

        def trains() -> bool:
            slurm.until_state(self.job_id, "RUNNING")
            return self.starts() >= starts and not self.notes()[-1].endswith("told")

        slurm.until(trains, f"start {starts} of {self.folder.name}: {self.notes()}")
        time.sleep(0.5)

    def tell(self, signal: str) -> None:
        """Send a signal to the batch script, as SLURM does before the time limit."""
        self.slurm.run("scancel", f"--signal={signal}", "--batch", self.job_id)
