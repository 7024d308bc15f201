"""What a run leaves: one JSON object with everything a table needs. Standard library only."""

import datetime as dt
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.goals import judged
from benchmarks.harness.machine import commit, machine, versions
from benchmarks.harness.session import Effort, Entry
from benchmarks.harness.spec import Benchmark, Case

Json = dict[str, Any]
CLOCKS = {"cpu": "process CPU time, user and system, all threads and ranks", "cuda": "CUDA events"}


def opening(benchmark: Benchmark, effort: Effort, *, quick: bool) -> Json:
    """All that is known before the first case."""
    device = "cuda" if benchmark.needs_cuda else "cpu"
    return {
        "benchmark": benchmark.name,
        "summary": benchmark.summary,
        "layout": benchmark.layout,
        "quick": quick,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(),
        "versions": versions(),
        "device": device,
        "clock": CLOCKS[device],
        "threads": effort.threads,
        "rounds": effort.rounds,
        "calls": effort.calls,
        "load_average_before": os.getloadavg()[0],
    }


def closing(record: Json, benchmark: Benchmark) -> None:
    """Add what is known after the last case. Goals are for full sizes, so a quick run judges none."""
    record["load_average_after"] = os.getloadavg()[0]
    record["goals"] = [] if record["quick"] else judged(benchmark, record)


def case_record(case: Case, sizes: Mapping[str, float], entries: Sequence[Entry]) -> Json:
    """One case with every contestant, and how its times compare with ours."""
    baselines = {}
    for entry in entries:
        if entry.contestant.ours and entry.runs:
            baselines.setdefault(entry.contestant.group, entry)
    return {
        "name": case.name,
        "parameters": dict(case.parameters),
        "ranks": case.ranks,
        "shows_wall": case.shows_wall,
        "sizes": dict(sizes),
        "contestants": [_contestant(entry, baselines.get(entry.contestant.group)) for entry in entries],
    }


def _contestant(entry: Entry, baseline: Entry | None) -> Json:
    contestant = entry.contestant
    known: Json = {"name": contestant.name, "group": contestant.group, "ours": contestant.ours, "note": contestant.note}
    if entry.skipped:
        return {**known, "skipped": entry.skipped}
    if entry.failed:
        return {**known, "failed": entry.failed, "differences": entry.differences}
    known |= {
        "differences": entry.differences,
        "seconds": entry.seconds,
        "wall_s": entry.wall_s,
        "median_s": statistics.median(entry.seconds),
        "peak_bytes": entry.peak_bytes,
    }
    if baseline is not None and baseline is not entry:
        known |= {
            "compared_with": baseline.contestant.name,
            "ratio": _ratio(entry.seconds, baseline.seconds),
            "wall_ratio": _ratio(entry.wall_s, baseline.wall_s),
        }
    return known


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> Json:
    ratios = [each / own for each, own in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def failures(record: Json) -> list[str]:
    """Contestants that gave no figure although they are installed."""
    return [
        f"{case['name']} | {each['name']}: {each['failed']}"
        for case in record["cases"]
        for each in case["contestants"]
        if "failed" in each
    ]
