"""Verifiers in processes of their own: several at a time, each with a time limit that holds whatever they do.

A limit inside the process (an alarm signal) ends what runs in Python and keeps the process. What does not hear it, for
one a power with a million digits in a single C call, misses the limit outside, and its process is killed and replaced.
"""

import atexit
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, cast

from megatron_klrl.errors import WorkError
from megatron_klrl.runtime.stop import STOPS
from megatron_klrl.tasks.task import Verdicts

_START_S = 120.0  # interpreter and imports on a busy machine
_GRACE_S = 1.0  # between the limit inside the process and the one outside
_context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and vLLM


class Verifier(Protocol):
    """What a process verifies with; travels there by pickle, so it is plain data. Equal verifiers share a pool."""

    def load(self) -> Callable[..., float]:
        """In the process: import what is needed and return the function from a case to its reward."""
        ...


class VerifierPool:
    """Long-lived processes that score cases. They start with the first case and end with this one."""

    def __init__(self, verifier: Verifier, *, workers: int, timeout_s: float) -> None:
        """Start nothing yet.

        Args:
            verifier: what each process loads.
            workers: processes.
            timeout_s: longest time for one case, in seconds.
        """
        self._verifier, self._size, self._timeout_s = verifier, workers, timeout_s
        self._workers: list[_Worker] = []

    def score(self, cases: Sequence[tuple[Any, ...]]) -> Verdicts:
        """Reward of each case, the arguments of the verifier's function; 0 for one that hangs, raises or is not finite.

        Raises:
            WorkError: a process could not start.
        """
        try:
            return self._score(cases)
        except BaseException:
            self.close()  # an answer still on its way must not be taken for one of the next batch
            raise

    def _score(self, cases: Sequence[tuple[Any, ...]]) -> Verdicts:
        waiting, found = deque(enumerate(cases)), Verdicts(rewards=[0.0] * len(cases))
        timeouts = errors = 0
        while len(self._workers) < min(self._size, len(cases)):
            self._workers.append(self._worker())
        while waiting or any(worker.case is not None for worker in self._workers):
            for worker in self._workers:
                if worker.idle and waiting:
                    worker.take(*waiting.popleft(), limit_s=self._timeout_s + _GRACE_S)
            for place, worker in self._answered():
                case, (kind, value) = worker.case, worker.answer()
                if kind == "reward" and case is not None:
                    found.rewards[case] = value
                timeouts += kind == "timeout"
                errors += kind in {"error", "died"}
                if kind in {"timeout", "died"} and worker.ended:
                    self._workers[place] = self._worker()
        return Verdicts(rewards=found.rewards, timeouts=timeouts, errors=errors)

    def _answered(self) -> list[tuple[int, "_Worker"]]:
        """Workers with something to say, or whose time is over; waits for the first."""
        busy = [worker for worker in self._workers if not worker.idle]
        nearest = min(worker.deadline for worker in busy)
        ready = wait([worker.connection for worker in busy], timeout=max(0.0, nearest - time.monotonic()))
        return [
            (place, worker)
            for place, worker in enumerate(self._workers)
            if not worker.idle and (worker.connection in ready or worker.deadline <= time.monotonic())
        ]

    def _worker(self) -> "_Worker":
        return _Worker(self._verifier, timeout_s=self._timeout_s)

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []


@cache
def shared_pool(verifier: Verifier, *, workers: int, timeout_s: float) -> VerifierPool:
    """The one pool of this process for these settings: sets that verify alike share it."""
    pool = VerifierPool(verifier, workers=workers, timeout_s=timeout_s)
    atexit.register(pool.close)  # else multiprocessing would ask them with SIGTERM, which they do not hear, and wait
    return pool


class _Worker:
    """One process, from this side. It starts, says so, then takes one case at a time."""

    def __init__(self, verifier: Verifier, *, timeout_s: float) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, verifier, timeout_s), daemon=True)
        with _deaf():
            self._process.start()
        theirs.close()  # so that the process's end is seen as the end of the connection
        self.case: int | None = None
        self.deadline = time.monotonic() + _START_S
        self._starting, self.ended = True, False

    @property
    def idle(self) -> bool:
        """Whether it can take a case."""
        return self.case is None and not self._starting

    def take(self, number: int, case: tuple[Any, ...], *, limit_s: float) -> None:
        """Give it a case."""
        self.case, self.deadline = number, time.monotonic() + limit_s
        with suppress(BrokenPipeError):  # it died while it waited: answer() finds the end and counts the case
            self.connection.send(case)

    def answer(self) -> tuple[str, float]:
        """Kind of answer and reward; ends the process if there is none in time.

        Raises:
            WorkError: it did not start.
        """
        kind, value = self._receive()
        if self._starting and kind != "ready":
            self.kill()
            raise WorkError(f"a verifier process did not start: {value if kind == 'failed' else kind}")
        self._starting, self.case = False, None
        return kind, cast("float", value)

    def _receive(self) -> tuple[str, float | str]:
        if not self.connection.poll():
            self.kill()
            return "timeout", 0.0
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.kill()
            return "died", 0.0

    def kill(self) -> None:
        """End it, whatever it does."""
        self.ended = True
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """What starts in the body never hears the signals by which a run is asked to stop after its step.

    They reach whole process groups, and a case whose process they end would count as a failed verification.
    """
    resource_tracker.ensure_running()  # starting it, which the first process would do, lets SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _OutOfTimeError(BaseException):
    """Not an Exception: verifiers catch those."""


def _out_of_time(*_: object) -> None:
    raise _OutOfTimeError


def _serve(connection: Connection, verifier: Verifier, timeout_s: float) -> None:
    """The process: load once, then case by case, until the other side is gone."""
    os.dup2(2, 1)  # standard output belongs to the command; what a verifier prints goes where its errors go
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends this process
    try:
        score = verifier.load()
    except Exception as error:  # noqa: BLE001 - the boundary of the process: the parent must hear of it
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    signal.signal(signal.SIGALRM, _out_of_time)
    connection.send(("ready", 0.0))
    while True:
        try:
            case = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(_scored(score, case, timeout_s))


def _scored(score: Callable[..., float], case: tuple[Any, ...], timeout_s: float) -> tuple[str, float]:
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        value = float(score(*case))
    except _OutOfTimeError:
        return "timeout", 0.0
    except Exception:  # noqa: BLE001 - a user's function or a parser may raise anything; it is counted
        return "error", 0.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ("reward", value) if math.isfinite(value) else ("error", 0.0)
