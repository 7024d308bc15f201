"""Where libraries' warnings and chatter go, so that the terminal shows the run alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stderr_into(file: Path) -> Iterator[None]:
    """Send this process's standard error, C libraries included, into a file while the body runs.

    An exception that leaves the body is reported by the caller on the real standard error again.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def log_file(run_dir: Path, rank: int) -> Path:
    """The log of one rank: log.txt for rank 0, logs/rankN.txt for the others."""
    return run_dir / "log.txt" if rank == 0 else run_dir / "logs" / f"rank{rank}.txt"
