"""Asked to stop by a signal: the handler sets a flag, the loop looks at it, a file says that there is more to do."""

import atexit
import json
import os
import signal
from pathlib import Path
from types import FrameType

STOPS = (signal.SIGUSR1, signal.SIGTERM)
"""What asks a run to stop after the current step: a batch system's warning before its time limit, and preemption."""
UNFINISHED = "unfinished.json"


class StopRequest:
    """Whether this process was asked to stop.

    Under a launcher any number of signals is one request: a batch system and torchrun each send their own, at different
    times, to some of the ranks. The launcher is what ends ranks that do not stop. A process without one has nobody to
    do that, so its second SIGTERM ends it.
    """

    def __init__(self, *, has_launcher: bool) -> None:
        self._has_launcher = has_launcher
        self._seen: set[int] = set()

    @property
    def number(self) -> int:
        """The signal; 0 without a request."""
        return max(self._seen, default=0)

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """The handler."""
        if number in self._seen and number == signal.SIGTERM and not self._has_launcher:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._seen.add(number)


def listen(*, has_launcher: bool) -> StopRequest:
    """Take ``STOPS`` as requests from here to the end of the process; what came while they were blocked counts.

    They are not put back: a signal that comes twice must not end a rank that is on its way out. Python itself puts
    handlers back while it ends, so from then on they are ignored.
    """
    request = StopRequest(has_launcher=has_launcher)
    for number in STOPS:
        signal.signal(number, request.note)
    atexit.register(_ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    return request


def _ignore() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def write_unfinished(run_dir: Path, *, step: int, steps: int, number: int) -> None:
    """Say, for whoever started the run, that it stopped in good order and is not at its end.

    Args:
        run_dir: of the run.
        step: finished steps, all of them in a checkpoint.
        steps: of the whole run.
        number: signal that asked for it.
    """
    draft = run_dir / f".{UNFINISHED}"
    draft.write_text(json.dumps({"step": step, "steps": steps, "signal": signal.Signals(number).name}) + "\n")
    draft.replace(run_dir / UNFINISHED)


def clear_unfinished(run_dir: Path) -> None:
    """A run starts: whatever an earlier start said is over."""
    (run_dir / UNFINISHED).unlink(missing_ok=True)
