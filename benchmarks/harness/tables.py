"""Tables in Markdown from records, for the terminal and for docs/benchmarks.md alike. Standard library only."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness.goals import least_s

Json = dict[str, Any]
_UNITS = {
    "times_faster": "x",
    "peak_share": "of its peak",
    "peak_over_input": "of the input",
    "milliseconds": "ms",
    "share_of_ceiling": "of the ceiling",
    "spread": "x",
}
_UPPER = {"peak_share", "peak_over_input", "milliseconds", "spread"}


def render(record: Json) -> str:
    """Everything a reader needs of one run."""
    body = (
        _matrix(record)
        if record["layout"] == "matrix"
        else [part for case in record["cases"] for part in _case(case, record)]
    )
    return (
        "\n".join(
            [
                *_heading(record),
                "",
                *body,
                *_goals(record["goals"], together=record["layout"] == "matrix"),
                *_notes(record),
            ]
        ).rstrip()
        + "\n"
    )


def _heading(record: Json) -> list[str]:
    machine, ceilings = record["machine"], record["ceilings"]
    where = f"{ceilings['device']}, {machine['cpu']}" if "device" in ceilings else machine["cpu"]
    changed = f" with {record['changed_files']} changed files" if record.get("changed_files") else ""
    libraries = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    sentences = [
        f"{record['date'][:10]}, commit {record.get('commit', 'unknown')[:10]}{changed}; {where}, ",
        f"{machine['cores']} cores, {record['threads']} threads, {machine['memory_gib']} GiB; ",
        f"load average {record['load_average_before']:.1f} before, {record['load_average_after']:.1f} after.\n",
        f"Time: {record['clock']}; median of {record['rounds']} turns of {record['calls']} call(s).\n",
        f"Ceilings measured in this run: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, ",
        f"GEMM {ceilings['gemm_flops_per_s'] / 1e12:.2f} TFLOP/s. {libraries}.",
    ]
    lines = [record["summary"][0].upper() + record["summary"][1:] + ".", "", "".join(sentences)]
    if record["quick"]:
        lines += ["", "**Small sizes: this run shows that everything works, its figures mean little.**"]
    return lines


def _case(case: Json, record: Json) -> list[str]:
    least = 1000 * least_s(case, record)
    ranks = f", {case['ranks']} processes each" if case["ranks"] > 1 else ""
    size = f"input {_mib(case['sizes']['input_bytes'])} MiB, ceilings allow {least:.2f} ms of wall time"
    wall = case.get("shows_wall", False)
    clocks = ["CPU ms", "x ours (least - most)", "wall ms", "x ours, wall"] if wall else ["ms", "x ours (least - most)"]
    header = ["implementation", *clocks, "extra peak MiB", "off by: loss", "values", "gradient"]
    parts = [f"**{case['name']}**{ranks}; {size}", ""]
    for group in dict.fromkeys(each["group"] for each in case["contestants"]):
        rows = [_row(each, wall=wall) for each in case["contestants"] if each["group"] == group]
        parts += [f"{group}:", "", *_table(header, rows), ""]
    return parts


def _row(each: Json, *, wall: bool) -> list[str]:
    name = f"**{each['name']}**" if each["ours"] else each["name"]
    no_clocks = [""] * (3 if wall else 1)
    if "skipped" in each:
        return [name, "skipped", *no_clocks, "", "", "", ""]
    off = each["differences"]
    errors = [_most(off, "loss"), _most(off, "values"), _most(off, "gradients")]
    if "failed" in each:
        return [name, "no figure", *no_clocks, "", *errors]
    clocks = [f"{1000 * each['median_s']:.2f}", _ratio(each, "ratio")]
    if wall:
        clocks += [f"{1000 * statistics.median(each['wall_s']):.2f}", _ratio(each, "wall_ratio")]
    return [name, *clocks, _mib(each["peak_bytes"]), *errors]


def _ratio(each: Json, kind: str) -> str:
    if kind not in each:
        return "1" if each["ours"] else ""
    ratio = each[kind]
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} - {ratio['most']:.2f})"


def _matrix(record: Json) -> list[str]:
    """One row per case that a peer takes part in, and one for the spread of all."""
    names = list(dict.fromkeys(each["name"] for case in record["cases"] for each in case["contestants"]))
    header = ["configuration", *(f"{name}, us" for name in names), *(f"{name}, x ours" for name in names[1:])]
    rows = []
    for case in record["cases"]:
        found = {each["name"]: each for each in case["contestants"]}
        if len(found) > 1:
            times = [_microseconds(found.get(name)) for name in names]
            rows.append([f"`{case['name']}`", *times, *(_ratio_or_blank(found.get(name)) for name in names[1:])])
    return [*_table(header, rows), "", *_spread_lines(record, names[0]), ""]


def _spread_lines(record: Json, ours: str) -> list[str]:
    times = {
        case["name"]: 1e6 * each["median_s"]
        for case in record["cases"]
        for each in case["contestants"]
        if each["name"] == ours and "seconds" in each
    }
    if not times:
        return []
    fastest, slowest = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    middle = statistics.median(times.values())
    extremes = f"fastest `{fastest}` {times[fastest]:.0f} us, median {middle:.0f} us, slowest `{slowest}` "
    return [f"All {len(times)} configurations, {ours}: {extremes}{times[slowest]:.0f} us."]


def _microseconds(each: Json | None) -> str:
    if each is None:
        return ""
    if "seconds" not in each:
        return "skipped" if "skipped" in each else "no figure"
    return f"{1e6 * each['median_s']:.0f}"


def _ratio_or_blank(each: Json | None) -> str:
    return _ratio(each, "ratio") if each is not None and "ratio" in each else ""


def _goals(goals: Sequence[Json], *, together: bool) -> list[str]:
    """A row per goal and case; with ``together`` one per goal, with the case that is furthest from it."""
    rows = [_goal_row(goal, goal["case"]) for goal in goals]
    if together:
        rows = [_worst_row(text, [goal for goal in goals if goal["text"] == text]) for text in _unique(goals)]
    return ["Goals:", "", *_table(["goal", "case", "wanted", "measured", ""], rows), ""] if rows else []


def _goal_row(goal: Json, case: str) -> list[str]:
    return [
        goal["text"],
        case,
        f"{'at most' if goal['measure'] in _UPPER else 'at least'} {_number(goal['bound'])}",
        f"{_number(goal['figure'])} {_UNITS[goal['measure']]}",
        "reached" if goal["reached"] else "**not reached**",
    ]


def _worst_row(text: str, goals: Sequence[Json]) -> list[str]:
    pick = max if goals[0]["measure"] in _UPPER else min
    worst = pick(goals, key=lambda goal: goal["figure"])
    reached = sum(goal["reached"] for goal in goals)
    where = worst["case"] if len(goals) == 1 else f"`{worst['case']}`, the worst of {len(goals)} ({reached} reach it)"
    return _goal_row({**worst, "text": text}, where)


def _unique(goals: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(goal["text"] for goal in goals))


def _notes(record: Json) -> list[str]:
    """What the reader must know of the contestants, and who is missing and why, each once."""
    notes: dict[str, None] = {}
    for case in record["cases"]:
        for each in case["contestants"]:
            if each["note"]:
                notes[f"- {each['name']}: {each['note']}"] = None
            if "skipped" in each:
                notes[f"- {each['name']} was skipped: {each['skipped']}"] = None
            if "failed" in each:
                notes[f"- {each['name']} has no figure in {case['name']}: {each['failed']}"] = None
    return [*notes, ""] if notes else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    aligned = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows)]


def _most(differences: Json, kind: str) -> str:
    found = [value for name, value in differences.items() if name.split("/")[0] == kind]
    return f"{max(found):.0e}" if found else ""


def _mib(number: float) -> str:
    return f"{number / 2**20:.0f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
