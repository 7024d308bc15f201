"""A bound on each step: past it, every rank writes down what all its threads do, and the run ends."""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_POLL_S = 0.05


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return run_dir / "stacks" / f"rank{rank}.txt"


class StepBound:
    """A thread that watches one piece of work after the other: a step, an evaluation, a checkpoint.

    The thread ends the process itself: what holds the main thread is another rank, a driver or a file system, and none
    of them hears an exception.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        ranks: int,
        timeout_s: float,
        place: Callable[[], str],
        fail: Callable[[str], object],
        settle_s: float = 5.0,
    ) -> None:
        """Watch nothing yet.

        Args:
            run_dir: of the run; all ranks share it.
            rank: of this process.
            ranks: of the job.
            timeout_s: bound on one piece, in seconds.
            place: says where the rank is in its work.
            fail: told the reason once the stacks are written, before the process ends.
            settle_s: longest wait for the stacks of the other ranks, in seconds.
        """
        self._run_dir, self._rank, self._ranks = run_dir, rank, ranks
        self._timeout_s, self._settle_s = timeout_s, settle_s
        self._place, self._fail = place, fail
        self._what, self._since = "", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step bound", daemon=True)

    def __enter__(self) -> Self:
        """Start to watch."""
        stack_file(self._run_dir, self._rank).unlink(missing_ok=True)
        self.begin("the first step")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop to watch."""
        self._over.set()
        self._thread.join()

    def begin(self, what: str) -> None:
        """The next piece of work begins."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(max(_POLL_S, self._since + self._timeout_s - time.monotonic())):
            if time.monotonic() - self._since > self._timeout_s:
                self._strike()

    def _strike(self) -> None:
        try:
            what = self._what
            with suppress(OSError):  # a full disk may be what holds the step
                self._write_stacks(what)
            self._fail(self._reason(what))
        finally:
            os._exit(1)

    def _reason(self, what: str) -> str:
        """In words, once the other ranks have written theirs or had the time to."""
        deadline = time.monotonic() + self._settle_s
        while len(self._places()) < self._ranks and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        places = self._places()
        silent = [f"rank {rank}" for rank in range(self._ranks) if rank not in places]
        told = [f"rank {rank} in {place}" for rank, place in places.items()]
        if silent:
            told.append(f"{', '.join(silent)} wrote none: stopped, or gone with its machine")
        return (
            f"{what} took longer than loop.step_timeout_s = {self._timeout_s:g} s; stacks of all threads are in "
            f"{stack_file(self._run_dir, 0).parent}: {'; '.join(told)}"
        )

    def _write_stacks(self, what: str) -> None:
        file = stack_file(self._run_dir, self._rank)
        file.parent.mkdir(exist_ok=True)
        draft = file.with_name(f".{file.name}")
        with draft.open("w") as out:
            out.write(
                f"{self._place() or 'between phases'}\n"
                f"{what}, rank {self._rank}, process {os.getpid()} on {socket.gethostname()}\n"
            )
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        draft.replace(file)

    def _places(self) -> dict[int, str]:
        """Of the ranks that have written their stacks, what each was in."""
        files = {rank: stack_file(self._run_dir, rank) for rank in range(self._ranks)}
        return {rank: file.read_text().split("\n", 1)[0] for rank, file in files.items() if file.exists()}
