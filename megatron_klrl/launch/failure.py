"""error.json: how the rank that failed first tells the process that started it why."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_klrl.errors import DivergenceError, UserError, WorkError

ERROR_FILE = "error.json"
EXIT_CODES = {"user": 2, "work": 1, "diverged": 1}
Kind = Literal["user", "work", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank ended.

    Attributes:
        kind: ``user``: the input is wrong (exit code 2); ``work``: the work failed (exit code 1); ``diverged``: it
            failed because training left the numbers (exit code 1).
        rank: global rank.
        message: what the user is told.
    """

    kind: Kind
    rank: int
    message: str


def kind_of(error: UserError | WorkError) -> Kind:
    """What kind of failure an error is."""
    if isinstance(error, DivergenceError):
        return "diverged"
    return "user" if isinstance(error, UserError) else "work"


def write_failure(run_dir: Path, failure: Failure) -> bool:
    """Write error.json unless another rank was first.

    The first rank to fail knows the reason; the others only see that it is gone.

    Returns:
        Whether this rank was first.
    """
    draft = run_dir / f".{ERROR_FILE}.{failure.rank}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(failure)) + "\n", encoding="utf-8")
    try:
        os.link(draft, run_dir / ERROR_FILE)  # fails if the file is there, and nobody ever reads half a file
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def read_failure(run_dir: Path) -> Failure | None:
    """What the first failing rank wrote, None if none did (or what is there is not such a file)."""
    try:
        values = json.loads((run_dir / ERROR_FILE).read_text(encoding="utf-8"))
        failure = Failure(kind=values["kind"], rank=int(values["rank"]), message=str(values["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return failure if failure.kind in EXIT_CODES else None


def clear_failure(run_dir: Path) -> None:
    """Remove what an earlier start in the same folder left."""
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
