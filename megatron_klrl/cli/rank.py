"""One rank of a run: where it stands, and how its failure reaches the process that started it."""

import os
import sys
import traceback as tracebacks
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from megatron_klrl.cli.reporting import tell
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.failure import EXIT_CODES, Failure, kind_of, write_failure
from megatron_klrl.launch.local import RUN_DIR_VARIABLE
from megatron_klrl.runtime.logs import log_file
from megatron_klrl.runtime.place import described, place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """What the environment says of this process.

    Attributes:
        rank: global rank.
        world_size: ranks of the job.
        one_machine: all of them are on this machine.
        run_dir: run directory the local launcher chose; None under torchrun.
    """

    rank: int
    world_size: int
    one_machine: bool
    run_dir: Path | None


def rank_place() -> RankPlace | None:
    """This process's place in a job; None if no launcher started it.

    Raises:
        UserError: a launcher's variable is missing or not a number.
    """
    if "RANK" not in os.environ:
        return None
    world_size = _number("WORLD_SIZE")
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    return RankPlace(
        rank=_number("RANK"),
        world_size=world_size,
        one_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world_size,
        run_dir=Path(run_dir) if run_dir else None,
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        problem = f"RANK is set, so this is a rank of a job, but {name} is {text!r}"
        raise UserError(problem, field="environment", fix="start with klrl, torchrun or 'srun torchrun', or unset RANK")
    return int(text)


def run_as_rank(work: Callable[[], None], *, place: RankPlace, run_dir: Path | None, traceback: bool) -> None:
    """Do the work of one rank; a failure is written to ``run_dir/error.json`` and ends the rank.

    Args:
        work: what the rank does.
        place: where it stands.
        run_dir: where error.json goes; None if the ranks share no folder.
        traceback: show tracebacks of user and work errors too.

    Raises:
        typer.Exit: code 2 after a `UserError`, 1 after anything else.
    """
    try:
        work()
    except (UserError, WorkError) as error:
        if traceback:
            sys.stderr.write(tracebacks.format_exc())
        kind = kind_of(error)
        message = str(error) if kind == "user" else described(error, rank=place.rank)
        _fail(Failure(kind=kind, rank=place.rank, message=message), place, run_dir)
    except Exception as error:  # noqa: BLE001 - the boundary of the rank: whatever it is, the parent must hear of it
        where = _keep_traceback(place, in_terminal=traceback)
        at = ", ".join(part for part in (f"rank {place.rank}", place_of(error)) if part)
        message = f"{at}: {type(error).__name__}: {error}{where}"
        _fail(Failure(kind="work", rank=place.rank, message=message), place, run_dir)


def _keep_traceback(place: RankPlace, *, in_terminal: bool) -> str:
    """Into the rank's log under our launcher, whose one message names it; else onto standard error."""
    text = tracebacks.format_exc()
    if place.run_dir is None or in_terminal:
        sys.stderr.write(text)
        return ""
    log = log_file(place.run_dir, place.rank)
    with log.open("a", encoding="utf-8") as file:
        file.write(text)
    return f" (traceback in {log})"


def _fail(failure: Failure, place: RankPlace, run_dir: Path | None) -> None:
    first = write_failure(run_dir, failure) if run_dir is not None and run_dir.is_dir() else True
    # Under our launcher the parent speaks; under torchrun nobody else does, and one rank is enough.
    if first and place.run_dir is None:
        tell(failure.message)
    raise typer.Exit(EXIT_CODES[failure.kind])
