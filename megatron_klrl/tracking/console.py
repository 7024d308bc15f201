"""What a person sees while a run goes on: phases of the start, a table that grows, a progress bar under it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_klrl.runtime.place import Places

_COLUMNS = (
    ("step", 5, "d", "step"),
    ("reward", 7, ".3f", "reward/mean"),
    ("KL nats", 8, ".3f", "kl/exact"),
    ("J", 7, ".3f", "objective/mean"),
    ("entropy", 8, ".3f", "policy/entropy"),
    ("length", 7, ".1f", "response/length_mean"),
    ("|grad|", 8, ".2f", "grad/norm"),
    ("mismatch", 9, ".0e", "mismatch/logprob_abs_mean"),
    ("s/step", 7, ".2f", "time/step_s"),
)
_MANY_STEPS = 40


class RunConsole:
    """What rank 0 prints. Without a terminal the same rows appear as plain lines and the bar is left out."""

    def __init__(
        self, *, steps: int, quiet: bool = False, console: Console | None = None, places: Places | None = None
    ) -> None:
        """Take the terminal.

        Args:
            steps: of the whole run.
            quiet: print nothing: for ranks other than 0.
            console: where to print; standard output by default.
            places: phases are among them.
        """
        self._places = places or Places()
        self.console = console or Console(highlight=False, quiet=quiet)
        self._row_every = 1 if steps <= _MANY_STEPS else 5
        self._steps = steps
        self._last_evaluation: Mapping[str, float] = {}
        self._progress = self._bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            transient=False,
        )
        self._task = self._progress.add_task("training", total=steps, visible=False)

    def _bar(self, *columns: ProgressColumn, transient: bool) -> Progress:
        return Progress(
            *columns,
            console=self.console,
            transient=transient,
            disable=not self.console.is_terminal,
            # rich would print what libraries write to standard error above the bar; it belongs into the log
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named piece of the start or the end: a spinner while it lasts, its time when it is over."""
        start = time.perf_counter()
        with self._bar(SpinnerColumn(), TextColumn("{task.description} ..."), transient=True) as spinner:
            spinner.add_task(name)
            with self._places.within(name):
                yield
        self.say(f"  {name}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def training(self, *, first_step: int) -> Iterator[None]:
        """The table's header, and the bar while the body runs."""
        self.say("[bold]" + "".join(f"{title:>{width}}" for title, width, _, _ in _COLUMNS))
        self._progress.update(self._task, completed=first_step, visible=True)
        with self._progress:
            yield

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One finished step, 1-based."""
        self._progress.update(self._task, completed=step)
        if step == 1 or step % self._row_every == 0 or step == self._steps:
            cells = {"step": step, **values}
            self.say("".join(_cell(cells.get(key), width, form) for _, width, form, key in _COLUMNS))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation of the current policy, with the change since the one before."""
        parts = []
        for name, value in values.items():
            if not name.endswith("/accuracy"):
                continue
            before = self._last_evaluation.get(name)
            change = "" if before is None else f" ({value - before:+.2f})"
            parts.append(f"{name.split('/')[1]} {value:.3f}{change}")
        self._last_evaluation = values
        self.say(f"[cyan]{step:>5}  evaluation: {'   '.join(parts)}")

    def say(self, line: str) -> None:
        """One line above the bar."""
        self.console.print(line, soft_wrap=True)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"
