"""What a study keeps in the folder of each run, and what it finds there when it goes on. Imports no torch."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_klrl.config.load import diff_recipes, dump_recipe, load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError

CONFIG, OUTCOME = "config.yaml", "outcome.json"
WEIGHTS = ("checkpoints", "hf")
_LOCKS = ".locks"


class Status(StrEnum):
    """How a run ended."""

    DONE = "done"
    DIVERGED = "diverged"
    REFUSED = "refused"
    FAILED = "failed"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a run.

    Attributes:
        status: how it ended.
        message: why, where it is not done.
        seconds: that it took, the engines' start left out where they served several.
        command: that repeats it.
        commit: of the source tree.
        versions: of what decides the numbers.
        machine: that it ran on.
    """

    status: Status
    message: str
    seconds: float
    command: str
    commit: str
    versions: str
    machine: str


class Start(StrEnum):
    """What there is to do for a run."""

    NOTHING = "nothing"
    FRESH = "fresh"
    RESUME = "resume"


def read_outcome(run_dir: Path) -> Outcome | None:
    """How a run ended; None if it has not."""
    try:
        values: dict[str, Any] = json.loads((run_dir / OUTCOME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    values["status"] = Status(values["status"])
    return Outcome(**values)


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Record the end of a run, whole or not at all."""
    _write(run_dir / OUTCOME, json.dumps(asdict(outcome), indent=2) + "\n")


def look(run_dir: Path, recipe: Recipe, *, retry: bool) -> Start:
    """What there is to do for a run, from what lies in its folder.

    Args:
        run_dir: of the run.
        recipe: that it is to have.
        retry: repeat what ended without a result.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    if not (run_dir / CONFIG).is_file():
        return Start.FRESH
    changed = diff_recipes(load_recipe(run_dir / CONFIG), recipe)
    if changed:
        first = changed[0]
        problem = f"{run_dir} holds a run with {first.path} {first.left!r}, the study now says {first.right!r}"
        raise UserError(problem, field="--out", fix="give another folder, or remove that one")
    outcome = read_outcome(run_dir)
    if outcome is not None and not (retry and outcome.status is not Status.DONE):
        return Start.NOTHING
    complete = any((run_dir / "checkpoints").glob("step_*/state.json"))
    return Start.RESUME if outcome is None and complete else Start.FRESH


def prepare(run_dir: Path, recipe: Recipe, start: Start) -> None:
    """Make the folder ready: a fresh run finds nothing of an earlier one."""
    if start is Start.FRESH:
        shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / CONFIG, dump_recipe(recipe))


def drop_weights(run_dir: Path) -> None:
    """Remove what a finished run needs no more: it is far larger than what is read of it."""
    for name in WEIGHTS:
        shutil.rmtree(run_dir / name, ignore_errors=True)


@contextmanager
def held(out: Path, name: str) -> Iterator[bool]:
    """Hold a run, so that no other process with this folder takes it at the same time; whether that worked."""
    file = out / _LOCKS / f"{name.replace('/', '+')}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _write(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)
