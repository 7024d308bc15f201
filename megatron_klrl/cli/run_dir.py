"""Run directories: their names, whether one may be written to, what is in it before the first step."""

import os
import re
from datetime import datetime
from pathlib import Path

import psutil

from megatron_klrl.cli.rank import RankPlace
from megatron_klrl.cli.reporting import tell
from megatron_klrl.config.load import Difference, diff_recipes, dump_recipe, load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError
from megatron_klrl.launch.failure import clear_failure
from megatron_klrl.runtime.stop import clear_unfinished

RUNS = Path("runs")
CONFIG_FILE = "config.yaml"
_STAMP = "%Y%m%d-%H%M%S"


def choose_run_dir(stem: str, given: Path | None, *, resume: bool, place: RankPlace | None) -> Path:
    """The run directory, not made yet.

    Args:
        stem: name of the recipe without suffix.
        given: what the user asked for.
        resume: continue a run: the given one, or the newest of this recipe.
        place: place in a job whose ranks must all choose the same name; None outside of one.

    Raises:
        UserError: nothing to resume, the given one is in use, or ranks cannot agree on a name.
    """
    if place is not None and place.run_dir is not None:
        return place.run_dir
    if resume:
        return _run_to_resume(given, place) if given is not None else _newest_run(stem)
    if given is None:
        return _new_name(stem, place)
    # Only the rank that writes the recipe may look: where it did, a moment later, it is there because of this start.
    if (place is None or place.rank == 0) and given.exists():
        _refuse_used(given, is_rank=place is not None)
    return given


def _refuse_used(given: Path, *, is_rank: bool) -> None:
    """Ranks that were quicker than the first may have made the folder and their logs in it; a recipe is the first's."""
    if not given.is_dir():
        raise UserError(f"{given} is a file", field="--run-dir", fix="give a folder")
    if (given / CONFIG_FILE).exists() if is_rank else any(given.iterdir()):
        fix = "add --resume to continue that run, or give another folder"
        raise UserError(f"{given} already holds a run", field="--run-dir", fix=fix)


def _run_to_resume(given: Path, place: RankPlace | None) -> Path:
    """The given folder, if it holds a run.

    A machine that starts the same command again (SLURM's requeue, torchrun's restarts) says --resume each time, and the
    start before may have died before it wrote anything: there a run that does not exist begins. For a person it is a
    mistake. Only one rank may look: a moment later the folder is there because another has made it.
    """
    if (place is not None and place.rank > 0) or (given / CONFIG_FILE).is_file():
        return given
    if not _restarted_by_a_machine():
        problem = f"{given} holds no run to resume (no {CONFIG_FILE})"
        raise UserError(problem, field="--run-dir", fix="give the folder of an earlier run, or leave --resume away")
    tell(f"--resume: {given} holds no run yet; this start begins one")
    return given


def _restarted_by_a_machine() -> bool:
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def _newest_run(stem: str) -> Path:
    pattern = re.compile(re.escape(stem) + r"-\d+(-\d+)*")
    entries = RUNS.iterdir() if RUNS.is_dir() else ()
    runs = [entry for entry in entries if pattern.fullmatch(entry.name) and (entry / CONFIG_FILE).is_file()]
    if not runs:
        problem = f"no earlier run {RUNS}/{stem}-* to resume"
        raise UserError(problem, field="--resume", fix="give its folder with --run-dir, or leave --resume away")
    return max(runs, key=lambda run: (run / CONFIG_FILE).stat().st_mtime)


def _new_name(stem: str, place: RankPlace | None) -> Path:
    if place is None:
        name = f"{stem}-{datetime.now().strftime(_STAMP)}"
        return next(path for path in _numbered(RUNS / name) if not path.exists())
    if job := os.environ.get("SLURM_JOB_ID"):
        return RUNS / f"{stem}-{job}"
    if place.one_machine:
        # All ranks have one parent, torchrun's agent; when it was started is something they agree on.
        started = psutil.Process(os.getppid()).create_time()
        return RUNS / f"{stem}-{datetime.fromtimestamp(started).strftime(_STAMP)}"
    problem = "ranks on several machines cannot agree on a name by themselves"
    raise UserError(problem, field="--run-dir", fix=f"add --run-dir, for example --run-dir {RUNS}/{stem}-1")


def _numbered(path: Path) -> list[Path]:
    return [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 100))]


def prepare_run_dir(run_dir: Path, recipe: Recipe, *, resume: bool) -> list[Difference]:
    """Make the folder and write the resolved recipe; what an earlier start wrote is kept beside it.

    What an earlier start said about its end (error.json, unfinished.json) is removed.

    Returns:
        On resume, the settings that differ from the earlier start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    clear_failure(run_dir)
    clear_unfinished(run_dir)
    config = run_dir / CONFIG_FILE
    changed: list[Difference] = []
    if resume and config.is_file():
        changed = diff_recipes(load_recipe(config), recipe)
        if changed:
            stamp = datetime.now().strftime(_STAMP)
            config.rename(config.with_name(f"config.until-{stamp}.yaml"))
    draft = config.with_name(f".{CONFIG_FILE}.{os.getpid()}")
    draft.write_text(dump_recipe(recipe), encoding="utf-8")
    draft.replace(config)
    return changed
