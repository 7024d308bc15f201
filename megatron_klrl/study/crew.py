"""The study's side of its workers: start them, hand them runs, notice how runs end, whatever happens to a worker."""

import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_klrl.config.load import dump_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.launch.failure import clear_failure, read_failure
from megatron_klrl.launch.local import COMMAND, die_with_parent
from megatron_klrl.study.folder import Outcome, Start, Status, drop_weights, held, prepare, write_outcome
from megatron_klrl.study.plan import PlannedRun
from megatron_klrl.study.wire import Order, read_done, recipe_of

WORKER = (*COMMAND, "study-worker")
_TICK_S = 0.5
_END_S = 20.0
_CHUNK = 1 << 16
_STATUSES = {"user": Status.REFUSED, "work": Status.FAILED, "diverged": Status.DIVERGED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Todo:
    """A run that is to be done.

    Attributes:
        run: which.
        start: from nothing or from its checkpoint.
    """

    run: PlannedRun
    start: Start


class Observer(Protocol):
    """Whoever shows how a study goes."""

    def started(self, run: PlannedRun) -> None: ...
    def ended(self, run: PlannedRun, outcome: Outcome) -> None: ...
    def elsewhere(self, run: PlannedRun) -> None: ...
    def tick(self, running: Sequence[PlannedRun]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """How runs are done.

    Attributes:
        out: folder of the study.
        jobs: workers at the same time.
        facts: versions, commit and machine, for the outcomes; status, message and seconds are replaced.
        keep_weights: of runs that have ended.
        observer: is told.
        command: that starts a worker; its folder and ``--ranks N`` are appended.
    """

    out: Path
    jobs: int
    facts: Outcome
    keep_weights: bool
    observer: Observer
    command: Sequence[str] = WORKER

    def work(self, todos: Sequence[Todo]) -> None:
        """Do all runs; whatever becomes of one, the others are done."""
        waiting, workers = list(todos), list[_Worker]()
        try:
            while waiting or workers:
                workers = [worker for worker in workers if not self._advance(worker, waiting)]
                while waiting and len(workers) < self.jobs:
                    worker = self._hire(waiting)
                    workers += [worker] if worker else []
                self.observer.tick([worker.run for worker in workers if worker.run])
                _pause(workers)
        finally:
            for worker in workers:
                worker.kill()

    def _hire(self, waiting: list[Todo]) -> "_Worker | None":
        """A worker for the first run that nobody else does."""
        while waiting:
            worker = _Worker(self, waiting[0].run)
            if self._order(worker, waiting):
                return worker
            worker.kill()
        return None

    def _order(self, worker: "_Worker", waiting: list[Todo]) -> bool:
        """Give a worker the first run that its engines fit; whether there was one."""
        for todo in [todo for todo in waiting if engine_key(todo.run) == worker.key]:
            waiting.remove(todo)
            stack = ExitStack()
            if not stack.enter_context(held(self.out, todo.run.name)):
                self.observer.elsewhere(todo.run)
                continue
            run_dir = self.out / todo.run.name
            prepare(run_dir, todo.run.recipe, todo.start)
            clear_failure(run_dir)
            self.observer.started(todo.run)
            worker.order(todo, stack, command=self._command(run_dir))
            return True
        return False

    def _advance(self, worker: "_Worker", waiting: list[Todo]) -> bool:
        """Take what a worker says; whether it is gone."""
        code = worker.ended()  # first, so that what it said before its end is read below
        for seconds in worker.replies():
            self._record(worker, Status.DONE, "", seconds)
            if not self._order(worker, waiting):
                worker.dismiss()
        if code is None:
            return False
        if worker.run is not None:
            status, message = _cause(self.out / worker.run.name, code, worker.folder)
            self._record(worker, status, message, time.monotonic() - worker.since)
        elif code == 0:
            shutil.rmtree(worker.folder, ignore_errors=True)
        worker.close()
        return True

    def _record(self, worker: "_Worker", status: Status, message: str, seconds: float) -> None:
        run = worker.finished()
        run_dir = self.out / run.name
        command = self._command(run_dir)
        outcome = replace(self.facts, status=status, message=message, seconds=round(seconds, 3), command=command)
        if not self.keep_weights:
            drop_weights(run_dir)
        write_outcome(run_dir, outcome)
        worker.release()
        self.observer.ended(run, outcome)

    @staticmethod
    def _command(run_dir: Path) -> str:
        return f"klrl train {run_dir / 'config.yaml'}"


def engine_key(run: PlannedRun) -> str:
    """What two runs must share for one worker to serve both: ranks, layout, model and everything an engine is told."""
    recipe: Recipe = run.recipe
    of_run = {"temperature", "top_p", "top_k", "max_tokens", "verify_every"}  # told with each request, or to the loop
    parts = {
        "ranks": run.ranks,
        "model": recipe.model.path,
        "parallel": recipe.parallel.model_dump(mode="json"),
        "precision": recipe.precision.model_dump(mode="json"),
        "generation": recipe.generation.model_dump(mode="json", exclude=of_run),
        "kernels": recipe.head.kernels.value,
    }
    return json.dumps(parts, sort_keys=True)


class _Worker:
    """A worker as the study sees it."""

    def __init__(self, crew: Crew, first: PlannedRun) -> None:
        (crew.out / "workers").mkdir(exist_ok=True)
        self.key, self.folder = engine_key(first), Path(tempfile.mkdtemp(dir=crew.out / "workers"))
        self.run: PlannedRun | None = None
        self.since, self._run_dir, self._rest = 0.0, Path(), b""
        self.silent = False
        self._lock = ExitStack()
        recipe_of(self.folder).write_text(dump_recipe(first.recipe), encoding="utf-8")
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [*crew.command, str(self.folder), "--ranks", str(first.ranks)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ},
                start_new_session=True,  # Ctrl-C reaches the study alone
                preexec_fn=die_with_parent,  # noqa: PLW1509  this process has no threads
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both were asked for")
        self._orders, self.output = self._process.stdin, self._process.stdout
        os.set_blocking(self.output.fileno(), False)

    def order(self, todo: Todo, lock: ExitStack, *, command: str) -> None:
        """Hand a run over; its lock is held until `release`."""
        self.run, self.since, self._lock = todo.run, time.monotonic(), lock
        self._run_dir = self.folder.parents[1] / todo.run.name
        order = Order(run_dir=str(self._run_dir), resume=todo.start is Start.RESUME, command=command)
        with suppress(BrokenPipeError):  # it has just died: `ended` says how
            self._orders.write(order.to_line())

    def replies(self) -> list[float]:
        """Seconds of the runs that are complete since the last call."""
        while chunk := self.output.read(_CHUNK):  # None: nothing now; empty: nothing ever again
            self._rest += chunk
        self.silent = chunk is not None
        *lines, self._rest = self._rest.split(b"\n")
        found = [read_done(line.decode(errors="replace") + "\n") for line in lines]
        return [done.seconds for done in found if done is not None and done.run_dir == str(self._run_dir)]

    def finished(self) -> PlannedRun:
        """The run it had."""
        run, self.run = self.run, None
        if run is None:
            raise AssertionError("only what was ordered can end")
        return run

    def release(self) -> None:
        """Let others take the run."""
        self._lock.close()

    def dismiss(self) -> None:
        """No more orders: it ends by itself."""
        self._orders.close()

    def ended(self) -> int | None:
        """Exit code, negative for a signal; None while it lives."""
        return self._process.poll()

    def close(self) -> None:
        """Let go of what has ended."""
        self._process.wait(_END_S)
        self._orders.close()
        self.output.close()
        self._lock.close()

    def kill(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close()


def _cause(run_dir: Path, code: int, folder: Path) -> tuple[Status, str]:
    """Why a worker ended in the middle of a run."""
    failure = read_failure(run_dir)
    if failure is not None:
        return _STATUSES[failure.kind], failure.message
    log = f"its log is in {folder / 'log.txt'}"
    if code < 0:
        hint = " (often the machine is out of memory)" if -code == signal.SIGKILL else ""
        return Status.CRASHED, f"the worker was killed by {signal.Signals(-code).name}{hint}; {log}"
    return Status.CRASHED, f"the worker ended with exit code {code}; {log}"


def _pause(workers: Sequence[_Worker]) -> None:
    """Until a worker says something, or for a tick."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            if not worker.silent:
                selector.register(worker.output, selectors.EVENT_READ)
        if workers:
            selector.select(_TICK_S)
