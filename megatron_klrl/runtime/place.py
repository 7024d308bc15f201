"""Where a rank is in its work: for errors on their way out, and for whoever finds the rank dead or stuck."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = "in "
_SIZE = 200


class Places:
    """The named pieces of work that a rank is in, the outermost first; kept by the main thread, read by any.

    Attributes:
        now: in words; empty outside of all.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Be nowhere.

        Args:
            file: holds ``now`` for other processes, whatever becomes of this one; None keeps none.
        """
        self.now = ""
        self._within: list[str] = []
        self._file = None if file is None else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """The body is in this place; an error that leaves it says so."""
        self._within.append(name)
        self._tell()
        try:
            yield
        except Exception as error:
            error.add_note(_MARK + name)
            raise
        finally:
            self._within.pop()
            self._tell()

    def _tell(self) -> None:
        self.now = ", ".join(self._within)
        if self._file is not None:
            with suppress(OSError):  # a full disk is found by what needs it
                os.pwrite(self._file, self.now.encode()[:_SIZE].ljust(_SIZE), 0)


def place_file(run_dir: Path, rank: int) -> Path:
    """Where a rank of the local launcher says where it is."""
    return run_dir / "logs" / f".rank{rank}.place"


def last_place(run_dir: Path, rank: int) -> str:
    """Where a rank of the local launcher was last; empty if it never said."""
    try:
        return place_file(run_dir, rank).read_text().strip()
    except OSError:
        return ""


def place_of(error: BaseException) -> str:
    """The places that an error left, the outermost first; empty if none was noted."""
    notes: list[str] = getattr(error, "__notes__", [])
    return ", ".join(note.removeprefix(_MARK) for note in reversed(notes) if note.startswith(_MARK))


def described(error: BaseException, *, rank: int | None = None) -> str:
    """Its message, with where it happened."""
    places = [text for text in ("" if rank is None else f"rank {rank}", place_of(error)) if text]
    return f"{error} ({', '.join(places)})" if place_of(error) else str(error)
