"""What a person sees while a study goes on: a line for each run that ends, and one bar with what runs now."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_klrl.study.folder import Outcome, Status
from megatron_klrl.study.plan import PlannedRun

_TAIL_BYTES = 1 << 16
_LINE_EVERY_S = 60.0


class StudyProgress:
    """Shows runs done, running and failed, with the time left. Without a terminal: lines, at least once a minute."""

    def __init__(self, out: Path, runs: Sequence[PlannedRun], *, finished: int, quiet: bool) -> None:
        """Take the terminal.

        Args:
            out: folder of the study.
            runs: that are to be done.
            finished: runs of the study that were complete before.
            quiet: print nothing.
        """
        self._out, self._start, self._said = out, time.monotonic(), time.monotonic()
        self._steps = sum(run.recipe.loop.steps for run in runs)
        self._ended_steps, self._total, self._before = 0, len(runs) + finished, finished
        self._counts: dict[Status, int] = dict.fromkeys(Status, 0)
        self._console = Console(highlight=False, quiet=quiet)
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        is_terminal = self._console.is_terminal
        self._bar = Progress(
            *columns, console=self._console, disable=not is_terminal, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._bar.add_task("", total=max(1, self._steps))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar, while the body runs."""
        with self._bar:
            yield

    def started(self, run: PlannedRun) -> None:
        """A worker has taken a run."""
        del run  # it shows in the next tick

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """A run has ended, well or not."""
        self._counts[outcome.status] += 1
        self._ended_steps += run.recipe.loop.steps
        note = f": {outcome.message}" if outcome.message else ""
        done = self._before + sum(self._counts.values())
        self._say(f"[{done}/{self._total}] {run.name}: {outcome.status} in {outcome.seconds:.0f} s{note}")

    def elsewhere(self, run: PlannedRun) -> None:
        """Another process does a run."""
        self._ended_steps += run.recipe.loop.steps
        self._say(f"{run.name}: another process is at it")

    def tick(self, running: Sequence[PlannedRun]) -> None:
        """Show where the running ones stand."""
        steps = {run.name: last_step(self._out / run.name) for run in running}
        finished = self._ended_steps + sum(steps.values())
        text = self._text(steps, {run.name: run.recipe.loop.steps for run in running}, finished)
        self._bar.update(self._task, completed=finished, description=text)
        if not self._console.is_terminal and time.monotonic() - self._said > _LINE_EVERY_S:
            self._say(text)

    def _text(self, steps: dict[str, int], of: dict[str, int], finished: int) -> str:
        failed = sum(count for status, count in self._counts.items() if status is not Status.DONE)
        done = self._before + self._counts[Status.DONE]
        left = self._total - done - failed - len(steps)
        running = ", ".join(f"{name} {step}/{of[name]}" for name, step in steps.items())
        counts = f"{done} done, {failed} failed, {left} waiting"
        return f"{counts}; {running or 'nothing runs'}; {self._left(finished)} left"

    def _left(self, finished: int) -> str:
        if not finished:
            return "time unknown"
        seconds = (time.monotonic() - self._start) / finished * (self._steps - finished)
        return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, soft_wrap=True, markup=False)


def last_step(run_dir: Path) -> int:
    """The newest step of a run's metrics; 0 before the first."""
    file = run_dir / "metrics.jsonl"
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0
