"""`klrl launch nemo-run` on a real SLURM and on this machine; needs NeMo-Run: make test-nemo-run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import RECIPE, ROOT, SlurmCluster, stub_cluster

pytest.importorskip("nemo_run", reason="needs the extra [nemo-run]: make test-nemo-run")
pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "megatron_klrl.cli", "launch", "nemo-run"]


def started(slurm: SlurmCluster, home: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """The command on the head, with a sacct that needs no database."""
    setting = ["env", f"NEMORUN_HOME={home}", f"PATH={HERE}:{os.environ['PATH']}", f"PYTHONPATH={ROOT}", "COLUMNS=200"]
    argv = [str(HERE / "cluster.sh"), "exec", str(slurm.state), *setting, *LAUNCH, *map(str, arguments)]
    return subprocess.Popen(
        argv, cwd=slurm.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_slurm_job_is_requeued_and_succeeds(slurm: SlurmCluster, stub_venv: Path, tmp_path: Path) -> None:
    """NeMo-Run's batch script requeues what fails, so a save is a failure to it; its status is read to the end."""
    file, run = tmp_path / "cluster.yaml", slurm.work / "nemo"
    file.write_text(json.dumps(stub_cluster(stub_venv, steps=60)))
    arguments = [RECIPE, "--executor", "slurm", "--cluster", file, "--run-dir", run]
    process = started(slurm, tmp_path / "home", *arguments)
    notes = run / "notes.txt"
    try:
        slurm.until(lambda: notes.exists() and notes.read_text().count("from 0") == 2, "two nodes at work")
        job_id = slurm.run("squeue", "--noheader", "--format=%i").strip()
        slurm.run("scancel", "--signal=USR1", job_id)
        slurm.until_state(job_id, "COMPLETED", "FAILED", timeout_s=90)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "status     SUCCEEDED" in output
    assert slurm.job(job_id)["Restarts"] == "1"
    told, again = (line for line in notes.read_text().splitlines() if "node1" in line and "until" in line)
    assert told.endswith("told")
    assert again.endswith("until 60")
    assert (run / "code" / "megatron_klrl" / "__init__.py").exists()


def test_this_machine_trains_to_the_end(tmp_path: Path) -> None:
    """Real engines, two ranks."""
    settings = ["loop.steps=2", "optimum.prompts=0", "loop.eval_every=0", "data.eval={}"]
    command = [*LAUNCH, str(RECIPE), *settings, "--run-dir", str(tmp_path / "run")]
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "status     SUCCEEDED" in done.stdout
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2, "a row for each step"


def test_a_failing_task_is_a_failing_command(tmp_path: Path) -> None:
    """The folder is in use: found by the ranks' own klrl, after NeMo-Run has started it."""
    program = (
        "from megatron_klrl.launch import nemo_run as klrl\n"
        f"script = klrl.train_script({str(RECIPE)!r}, 'kl.bta=1', run_dir={str(tmp_path / 'run')!r})\n"
        "if __name__ == '__main__':\n"
        "    klrl.launch(script, klrl.local_executor(), title='wrong')\n"
    )
    file = tmp_path / "launch.py"
    file.write_text(program)
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "the task ended as FAILED" in done.stderr
    assert "kl.bta: unknown key" in done.stdout + done.stderr
