"""What a study says to a worker's first rank on its standard input, and what that says back on its standard output."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_MARK = "klrl-study "  # libraries write to standard output too


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Do one run.

    Attributes:
        run_dir: holds its recipe.
        resume: from its newest checkpoint.
        command: that repeats it, for its card.
    """

    run_dir: str
    resume: bool
    command: str

    def to_line(self) -> bytes:
        """As a line."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A run is complete.

    Attributes:
        run_dir: of it.
        seconds: it took, without the engines' start.
    """

    run_dir: str
    seconds: float

    def to_line(self) -> str:
        """As a line."""
        return _MARK + json.dumps(asdict(self)) + "\n"


def read_order(line: str) -> Order | None:
    """The order of a line; None at the end of the stream."""
    return Order(**json.loads(line)) if line else None


def read_done(line: str) -> Done | None:
    """What a line of a worker says; None if a library wrote it."""
    return Done(**json.loads(line.removeprefix(_MARK))) if line.startswith(_MARK) else None


def recipe_of(folder: Path) -> Path:
    """The recipe in the folder of a worker, which its engines are started for."""
    return folder / "config.yaml"
