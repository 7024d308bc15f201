"""Runs the cases of a benchmark: starts the contestants, lets each prove its answer, then lets them take turns."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness.crew import Crew, CrewError
from benchmarks.harness.spec import Benchmark, Case, Contestant, Tolerance

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is done.

    Attributes:
        rounds: turns of each contestant.
        calls: calls per turn.
        threads: of a contestant, over all its ranks.
    """

    rounds: int
    calls: int
    threads: int


@dataclass(slots=True, kw_only=True)
class Entry:
    """A contestant in a case, and what became of it: figures, or why there are none."""

    contestant: Contestant
    crew: Crew | None = None
    skipped: str = ""
    failed: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def runs(self) -> bool:
        """Whether it has neither been skipped nor failed."""
        return not self.skipped and not self.failed

    def add(self, readings: Sequence[Mapping[str, Any]], *, device: str) -> None:
        """One turn, a reading per rank: CPU time adds up, a GPU's ranks run side by side, memory is each rank's own."""
        total = sum if device == "cpu" else max
        self.seconds.append(total(each["seconds"] for each in readings))
        self.wall_s.append(max(each["wall_s"] for each in readings))
        self.peak_bytes = max([self.peak_bytes, *(each["peak_bytes"] for each in readings)])

    def reject(self, missing: Mapping[str, str]) -> None:
        """A module is not there: a peer is skipped, ours has failed."""
        reason = f"{missing['message']}; to install it: {self.contestant.install}"
        if self.contestant.ours:
            self.failed = reason
        else:
            self.skipped = reason


class Session:
    """The processes of one benchmark and a folder for what they share. Use as a context."""

    def __init__(self, benchmark: Benchmark, effort: Effort, say: Say) -> None:
        self._benchmark, self._effort, self._say = benchmark, effort, say
        self._shared: dict[str, Crew] = {}
        self._started = 0
        self._resources = ExitStack()
        self._folder = Path()

    def __enter__(self) -> "Session":
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="klrl-benchmark-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def ceilings(self, device: str) -> dict[str, Any]:
        """What the machine can do at best, measured in a process of its own."""
        with self._crew(ranks=1, device=device, environment={}) as crew:
            return crew.ask("ceilings", device=device)[0]

    def run(self, case: Case) -> tuple[dict[str, float], list[Entry]]:
        """The sizes that the workload states, and every contestant with its figures."""
        entries = [Entry(contestant=each, skipped=missing_module(each)) for each in case.contestants]
        for entry in entries:
            if entry.skipped:
                self._tell(case, f"skipping {entry.contestant.name}: {entry.skipped}")
        with self._crews(case, entries):
            sizes, truth = self._truth(case)
            for entry in entries:
                if entry.runs:
                    self._admit(case, entry, truth)
            for number in range(self._effort.rounds):
                self._take_turns(case, entries, number)
        return sizes, entries

    @contextmanager
    def _crews(self, case: Case, entries: Sequence[Entry]) -> Iterator[None]:
        """All processes are started at once, so that they import their libraries side by side."""
        with ExitStack() as own:
            for entry in entries:
                if entry.runs:
                    entry.crew = self._crew_of(entry.contestant.name, case, own)
            yield

    def _crew_of(self, name: str, case: Case, own: ExitStack) -> Crew:
        """A crew that ends with the case, or with the session where processes are shared."""
        if name in self._shared:
            return self._shared[name]
        shared = self._benchmark.shared_processes
        crew = self._crew(ranks=case.ranks, device=case.device, environment=case.environment)
        (self._resources if shared else own).enter_context(crew)
        if shared:
            self._shared[name] = crew
        return crew

    def _crew(self, *, ranks: int, device: str, environment: Mapping[str, str]) -> Crew:
        self._started += 1
        return Crew(
            folder=self._folder / f"crew{self._started}",
            ranks=ranks,
            threads=max(1, self._effort.threads // ranks),
            device=device,
            environment=environment,
        )

    def _truth(self, case: Case) -> tuple[dict[str, float], str | None]:
        """Sizes of the workload, and where the float64 answer lies: on CPU it is made once, on a GPU by everyone."""
        self._tell(case, "float64 answer")
        path = str(self._folder / "truth") if case.device == "cpu" else None
        with ExitStack() as own:
            crew = self._crew_of("float64 answer", case, own)
            sizes = crew.ask("prepare", workload=case.workload, parameters=dict(case.parameters))[0]
            if path is not None:
                crew.ask("truth", path=path)
        return sizes, path

    def _admit(self, case: Case, entry: Entry, truth: str | None) -> None:
        """Inputs, import and parity; whoever is not in parity, or ends, gets no figure."""
        contestant, crew = entry.contestant, entry.crew
        assert crew is not None  # every entry that runs has one
        self._tell(case, f"parity of {contestant.name}")
        try:
            crew.ask("prepare", workload=case.workload, parameters=dict(case.parameters))
            missing = crew.ask("enter", factory=contestant.factory, options=dict(contestant.options))[0]
            if missing:
                entry.reject(missing)
            else:
                found = crew.ask("parity", path=truth)
                entry.differences = {name: max(each[name] for each in found) for name in found[0]}
                entry.failed = not_in_parity(entry.differences, case.tolerance, contestant)
        except CrewError as error:
            entry.failed = str(error)
        if not entry.runs:
            self._tell(case, f"{contestant.name}: {entry.skipped or entry.failed}")

    def _take_turns(self, case: Case, entries: Sequence[Entry], number: int) -> None:
        for entry in entries:
            if not entry.runs or entry.crew is None:
                continue
            try:
                readings = entry.crew.ask("measure", calls=self._effort.calls)
            except CrewError as error:
                entry.failed = str(error)
                self._tell(case, f"{entry.contestant.name}: {error}")
                continue
            entry.add(readings, device=case.device)
            if self._benchmark.layout == "cases":
                done = f"turn {number + 1} of {self._effort.rounds}: {entry.contestant.name}"
                self._tell(case, f"{done} {1000 * entry.seconds[-1]:.2f} ms")

    def _tell(self, case: Case, text: str) -> None:
        self._say(f"[{self._benchmark.name}] {case.name} | {text}")


def missing_module(contestant: Contestant) -> str:
    """Why a peer cannot take part, empty if it can. Looks for modules without importing them."""
    missing = [name for name in contestant.requires if find_spec(name) is None]
    return f"no module {', '.join(missing)} here; to install it: {contestant.install}" if missing else ""


def not_in_parity(differences: Mapping[str, float], tolerance: Tolerance, contestant: Contestant) -> str:
    """What differs too much from the float64 answer, empty if nothing does; NaN does."""
    gradient = contestant.gradient_tolerance or tolerance.gradient
    bounds = {"loss": tolerance.loss, "values": tolerance.values, "gradients": gradient}
    wrong = [
        f"{name} differs by {value:.2g}, allowed are {bounds[name.split('/')[0]]:.2g}"
        for name, value in differences.items()
        if not value <= bounds[name.split("/")[0]]
    ]
    return "not in parity: " + "; ".join(wrong) if wrong else ""
