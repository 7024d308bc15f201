"""Submitting to SLURM: the run directory's part of it, sbatch, and whether an earlier job still runs."""

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.batch_script import LOGS, BatchJob, render_script

_TIMEOUT_S = 120.0
_JOB_FILE = "job.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job in the queue.

    Attributes:
        job_id: of SLURM.
        script: that was submitted.
        log: file the job writes to; of an array, the pattern of its files.
    """

    job_id: str
    script: Path
    log: Path


def submit(job: BatchJob) -> Submitted:
    """Write the batch script into the run directory and submit it.

    Raises:
        WorkError: sbatch refuses the job, or does not answer.
    """
    folder = job.run_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{job.kind}.sbatch"
    script.write_text(render_script(job), encoding="utf-8")
    job_id = _run("sbatch", "--parsable", str(script)).strip().split(";")[0]
    log = folder / (f"job-{job_id}_*.out" if job.array else f"job-{job_id}.out")
    submitted = Submitted(job_id=job_id, script=script, log=log)
    record = {name: str(value) for name, value in asdict(submitted).items()}
    (folder / _JOB_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return submitted


def check_can_submit() -> None:
    """Whether this machine can submit.

    Raises:
        UserError: there is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        fix = "start it on a login node of the cluster, or add --dry-run to see the script"
        raise UserError("there is no sbatch on PATH", field="klrl launch slurm", fix=fix)


def check_not_running(run_dir: Path) -> None:
    """That no job of an earlier launch still writes to a run directory.

    Raises:
        UserError: one waits or runs.
    """
    try:
        job_id = json.loads((run_dir / LOGS / _JOB_FILE).read_text(encoding="utf-8"))["job_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    try:
        state = _run("squeue", "--noheader", "--format=%T", f"--jobs={job_id}").strip()
    except WorkError:
        return  # SLURM has forgotten jobs that ended a while ago, and says that such an id is invalid
    if state:
        problem = f"job {job_id} of {run_dir} is still {state.splitlines()[0]}"
        raise UserError(problem, field="--resume", fix=f"wait for it, or end it first: scancel {job_id}")


def _run(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkError(f"{program} does not answer: {error}") from error
    if done.returncode:
        raise WorkError(f"{program}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
