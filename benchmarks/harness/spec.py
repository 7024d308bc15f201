"""What a benchmark is, as plain data. Imports no torch: the process that directs a run starts at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

INSTALL = "environment/install.sh .venv-bench bench, then .venv-bench/bin/python benchmarks/run.py ..."
Measure = Literal["times_faster", "peak_share", "peak_over_input", "milliseconds", "share_of_ceiling", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One implementation, ours or a peer's.

    Attributes:
        name: what the tables call it.
        factory: ``module:function``; takes the workload and ``options``, returns a call that does the work once and
            gives an answer. Imported in the contestant's own process.
        options: keyword arguments of the factory.
        group: contestants are compared within a group, which does the same work.
        ours: part of this project. The first of ours in a group is what its peers are compared with.
        requires: modules that must be installed; without one the contestant is skipped.
        gradient_tolerance: replaces the case's, for a peer that rounds on purpose; ``note`` says why.
        note: what a reader must know to read its figures.
        install: how to get to an environment that has what it requires.
    """

    name: str
    factory: str
    options: Mapping[str, object] = field(default_factory=dict)
    group: str = "with entropy"
    ours: bool = False
    requires: tuple[str, ...] = ()
    gradient_tolerance: float | None = None
    note: str = ""
    install: str = INSTALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far an answer may be from the float64 answer.

    Attributes:
        loss: absolute difference of the loss, in its unit, per unit of the larger of 1 and the loss.
        values: relative difference, in Euclidean norm, of per-token values (log-probability, entropy).
        gradient: relative difference, in Euclidean norm, of each gradient.
    """

    loss: float
    values: float
    gradient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size of one benchmark.

    Attributes:
        name: unique within the benchmark.
        workload: ``module:class``, made in every process from ``parameters``: inputs and the float64 answer.
        parameters: keyword arguments of the workload; JSON.
        tolerance: what counts as the same answer.
        contestants: in the order in which they alternate.
        ranks: processes per contestant, joined by gloo.
        environment: variables for all contestants.
        shows_wall: wall times are published beside CPU times: for ranks that wait for each other, which costs a user
            time and the processor none.
    """

    name: str
    workload: str
    parameters: Mapping[str, object]
    tolerance: Tolerance
    contestants: tuple[Contestant, ...]
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    shows_wall: bool = False

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return str(self.parameters.get("device", "cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What we want to be true; printed with the figure, never asserted.

    Attributes:
        text: in words.
        ours: name of our contestant.
        measure: ``times_faster`` the peer's time over ours; ``peak_share`` our extra peak over the peer's;
            ``peak_over_input`` our extra peak over the bytes that the workload counts; ``milliseconds``;
            ``share_of_ceiling`` the time that the machine's measured copy rate or GEMM rate allows over ours;
            ``spread`` our slowest case over our fastest.
        against: name of the peer, where there is one.
        at_least: bound from below; exactly one of the two bounds is set.
        at_most: bound from above.
        cases: names of the cases it is for; empty for all of them.
        clock: ``seconds`` for the figure's own clock, ``wall_s`` for the wall's.
    """

    text: str
    ours: str
    measure: Measure
    against: str = ""
    at_least: float | None = None
    at_most: float | None = None
    cases: tuple[str, ...] = ()
    clock: Literal["seconds", "wall_s"] = "seconds"

    def __post_init__(self) -> None:
        """Refuse a goal without a bound, or with two."""
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"goal {self.text!r} needs exactly one of at_least and at_most")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A named comparison.

    Attributes:
        name: what the command line calls it.
        summary: one line.
        cases: full size.
        quick_cases: small ones, which show that everything works; their figures mean little.
        goals: see there.
        rounds: how often the contestants take turns.
        calls: calls of each contestant per turn.
        shared_processes: contestants live through all cases, where cases are many and tiny.
        layout: ``cases`` for a table per case, ``matrix`` for one table with a row per case.
    """

    name: str
    summary: str
    cases: tuple[Case, ...]
    quick_cases: tuple[Case, ...]
    goals: tuple[Goal, ...] = ()
    rounds: int = 5
    calls: int = 1
    shared_processes: bool = False
    layout: Literal["cases", "matrix"] = "cases"

    @property
    def needs_cuda(self) -> bool:
        """Whether it runs on a GPU only."""
        return any(case.device == "cuda" for case in self.cases)
