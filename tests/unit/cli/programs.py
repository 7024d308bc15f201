"""Running `klrl` as a user does, and once more with a training that only notes what it was asked."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

from typer.testing import CliRunner, Result

from megatron_klrl.cli.main import app

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples" / "recipes" / "arithmetic_cpu.yaml"

# What jobs.py does takes engines and minutes; end-to-end tests run it. Here the ranks are real, their work is not.
JOBS = """
import json, os, sys, types
from pathlib import Path
import megatron_klrl
from megatron_klrl.errors import UserError, WorkError

def note(name, **values):
    rank = os.environ.get("RANK", "none")
    Path(os.environ["NOTES"], f"{name}-{rank}.json").write_text(json.dumps(values, default=str))
    fate = os.environ.get("FATE", "")
    if fate == f"user-{rank}": raise UserError("too long", field="data.train", fix="shorten it")
    if fate == f"work-{rank}": raise WorkError("the loss is not finite")
    if fate == f"bug-{rank}": raise RuntimeError("broken")

def train_rank(recipe, run_dir, *, resume):
    note("train", steps=recipe.loop.steps, run_dir=run_dir, resume=resume)

def eval_rank(recipe, checkpoint, hf, *, as_json):
    note("eval", sets=sorted(recipe.data.eval), checkpoint=checkpoint, hf=hf, json=as_json)

def export_checkpoint(checkpoint, to):
    note("export", checkpoint=checkpoint, to=to)

module = types.ModuleType("megatron_klrl.jobs")
module.train_rank, module.eval_rank, module.export_checkpoint = train_rank, eval_rank, export_checkpoint
sys.modules["megatron_klrl.jobs"] = module
"""


def klrl(
    *arguments: str | Path, cwd: Path, notes: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One run of the program; with `notes`, the work of its ranks is replaced by a note in that folder."""
    path = [str(ROOT)]
    if notes is not None:
        notes.mkdir(exist_ok=True)
        (notes / "sitecustomize.py").write_text(JOBS)
        path.insert(0, str(notes))
        environment["NOTES"] = str(notes)
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "KLRL_RUN_DIR", "SLURM_JOB_ID"}
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    env = {**inherited, "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(path), **environment}
    command = [sys.executable, "-m", "megatron_klrl.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def klrl_here(*arguments: str | Path, cwd: Path) -> Result:
    """The same in this process, for what starts no rank: a tenth of the time."""
    with chdir(cwd):
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "RANK": None})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done
