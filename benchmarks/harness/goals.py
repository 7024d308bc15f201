"""What we wanted, what was measured, and whether it was reached. Standard library only; nothing here fails a run."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness.spec import Benchmark, Goal

Json = dict[str, Any]


def judged(benchmark: Benchmark, record: Json) -> list[Json]:
    """One verdict per goal and case in which both sides have figures."""
    found = []
    for goal in benchmark.goals:
        figures = _spread(goal, record) if goal.measure == "spread" else _per_case(goal, record)
        for case, figure in figures:
            found.append(
                {
                    "case": case,
                    "text": goal.text,
                    "measure": goal.measure,
                    "figure": figure,
                    "bound": goal.at_least if goal.at_least is not None else goal.at_most,
                    "reached": _reached(goal, figure),
                }
            )
    return found


def _reached(goal: Goal, figure: float) -> bool:
    if goal.at_least is not None:
        return figure >= goal.at_least
    return goal.at_most is not None and figure <= goal.at_most


def _per_case(goal: Goal, record: Json) -> Iterator[tuple[str, float]]:
    for case in record["cases"]:
        if goal.cases and case["name"] not in goal.cases:
            continue
        measured = {each["name"]: each for each in case["contestants"] if "seconds" in each}
        figure = _figure(goal, case, measured, record)
        if figure is not None:
            yield case["name"], figure


def _figure(goal: Goal, case: Json, measured: Mapping[str, Json], record: Json) -> float | None:
    ours = measured.get(goal.ours)
    peer = measured.get(goal.against)
    if ours is None or (goal.against and peer is None):
        return None
    if goal.measure == "milliseconds":
        return 1000 * statistics.median(ours[goal.clock])
    if goal.measure == "peak_over_input":
        return ours["peak_bytes"] / case["sizes"]["input_bytes"]
    if goal.measure == "share_of_ceiling":
        return least_s(case, record) / statistics.median(ours[goal.clock])
    if peer is None:
        return None
    if goal.measure == "peak_share":
        return ours["peak_bytes"] / peer["peak_bytes"] if peer["peak_bytes"] else None
    pairs = zip(peer[goal.clock], ours[goal.clock], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def least_s(case: Json, record: Json) -> float:
    """The time that the machine's own copy rate and GEMM rate allow for the work."""
    sizes, ceilings = case["sizes"], record["ceilings"]
    return max(sizes["least_bytes"] / ceilings["copy_bytes_per_s"], sizes["least_flops"] / ceilings["gemm_flops_per_s"])


def _spread(goal: Goal, record: Json) -> Iterator[tuple[str, float]]:
    times = [
        each["median_s"]
        for case in record["cases"]
        for each in case["contestants"]
        if each["name"] == goal.ours and "seconds" in each
    ]
    if len(times) > 1:
        yield "all", max(times) / min(times)
