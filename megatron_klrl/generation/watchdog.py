"""An end to waiting: a call that makes no progress fails, and says where it stood."""

import faulthandler
import os
import threading
import time
from types import TracebackType
from typing import Self

_STANDARD_ERROR = 2  # the file descriptor: in a run it leads into the rank's log, whatever sys.stderr is


class Watchdog:
    """Watches one call for progress.

    There are two ways to stall. Steps that return and achieve nothing are counted by the caller, who asks ``stalled``
    after each. A step that does not return cannot be asked: a thread writes the stacks of all threads into the log once
    the time is over, and waits on. What holds such a step is another rank or the driver; the timeout of collectives or
    whoever watches the job ends it, and the stacks say where it was.
    """

    def __init__(self, *, phase: str, timeout_s: float) -> None:
        """Name the phase for the log, and the longest time without progress, in seconds."""
        self._phase, self._timeout_s = phase, timeout_s
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watchdog: {phase}", daemon=True)

    def __enter__(self) -> Self:
        """Start to watch."""
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop to watch."""
        self._over.set()
        self._thread.join()

    def progress(self) -> None:
        """Something was achieved."""
        self._last = time.monotonic()

    def stalled(self) -> bool:
        """Whether nothing was for too long."""
        return time.monotonic() - self._last > self._timeout_s

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._last + self._timeout_s - time.monotonic())):
            if self.stalled():
                self._dump()
                self._over.wait()

    def _dump(self) -> None:
        text = f"{self._phase}: no progress for {self._timeout_s:g} s (generation.timeout_s); stacks of all threads:\n"
        os.write(_STANDARD_ERROR, text.encode())
        faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
