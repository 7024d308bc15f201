"""The published page is what the committed records say, and only full runs are published."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.harness.goals import judged
from benchmarks.harness.spec import Benchmark, Goal
from benchmarks.harness.tables import render
from benchmarks.suites import CPU_NAMES, GPU_NAMES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
BLOCK = "before\n<!-- results: sample -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """The script, imported from its file as it is run."""
    spec = importlib.util.spec_from_file_location("benchmarks_report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contestant(name: str, times: list[float], **more: object) -> dict[str, Any]:
    return {
        "name": name, "group": "with entropy", "ours": name == "ours", "note": "", "seconds": times,
        "median_s": sorted(times)[len(times) // 2], "peak_bytes": 3 * 2**20, "differences": {"loss": 1e-7}, **more,
    }  # fmt: skip


def sample(**more: object) -> dict[str, Any]:
    ratio = {"median": 4.0, "least": 3.0, "most": 5.0}
    case = {
        "name": "tiny", "ranks": 1, "sizes": {"input_bytes": 2**20, "least_bytes": 2e6, "least_flops": 0.0},
        "contestants": [
            contestant("ours", [0.001, 0.002, 0.003]),
            contestant("peer", [0.004, 0.008, 0.012], ratio=ratio, compared_with="ours", peak_bytes=6 * 2**20),
            {"name": "absent", "group": "with entropy", "ours": False, "note": "", "skipped": "no module absent"},
        ],
    }  # fmt: skip
    return {
        "benchmark": "sample", "summary": "a sample", "layout": "cases", "quick": False, "date": "2026-01-02T03:04:05",
        "commit": "0123456789abcdef", "changed_files": 0, "clock": "CPU time", "threads": 2, "rounds": 3, "calls": 1,
        "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 8.0}, "versions": {"torch": "2.11.0"},
        "load_average_before": 0.1, "load_average_after": 0.2, "goals": [], "cases": [case],
        "ceilings": {"copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e12}, **more,
    }  # fmt: skip


def goals(*wanted: Goal) -> Benchmark:
    return Benchmark(name="sample", summary="", cases=(), quick_cases=(), goals=wanted)


def test_the_page_is_what_the_records_say(report: ModuleType) -> None:
    assert report.render_page(PAGE, ROOT / "benchmarks/results", render) == PAGE


def test_the_page_has_a_place_for_every_benchmark() -> None:
    assert re.findall(r"<!-- results: (\w+) -->", PAGE) == [*CPU_NAMES, *GPU_NAMES]


def test_a_record_becomes_a_table_and_the_prose_stays(report: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text(json.dumps(sample()))
    made = report.render_page(BLOCK, tmp_path, render)
    assert made.startswith("before\n<!-- results: sample -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "old" not in made
    assert "| **ours** | 2.00 | 1 | 3 | 1e-07 |  |  |" in made
    assert "| peer | 8.00 | 4.00 (3.00 - 5.00) | 6 |" in made
    assert "| absent | skipped |" in made
    assert "- absent was skipped: no module absent" in made
    assert "commit 0123456789; a processor, 2 cores, 2 threads" in made
    assert report.render_page(made, tmp_path, render) == made


def test_without_a_record_the_page_says_how_to_get_one(report: ModuleType, tmp_path: Path) -> None:
    assert "`python benchmarks/run.py sample --json benchmarks/results/sample.json`" in report.render_page(
        BLOCK, tmp_path, render
    )


@pytest.mark.parametrize("wrong", [sample(quick=True), sample(benchmark="another")])
def test_a_quick_run_or_another_benchmarks_is_not_published(
    report: ModuleType, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    (tmp_path / "sample.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit, match=re.escape("sample.json")):
        report.render_page(BLOCK, tmp_path, render)


@pytest.mark.parametrize(
    ("goal", "figure", "reached"),
    [
        (Goal(text="", ours="ours", measure="times_faster", against="peer", at_least=4), 4.0, True),
        (Goal(text="", ours="ours", measure="times_faster", against="peer", at_least=4.1), 4.0, False),
        (Goal(text="", ours="ours", measure="peak_share", against="peer", at_most=0.5), 0.5, True),
        (Goal(text="", ours="ours", measure="peak_over_input", at_most=2), 3.0, False),
        (Goal(text="", ours="ours", measure="milliseconds", at_most=2), 2.0, True),
        (Goal(text="", ours="ours", measure="share_of_ceiling", at_least=0.9), 1.0, True),
    ],
)
def test_goals_are_judged_by_their_figure(goal: Goal, figure: float, reached: bool) -> None:  # noqa: FBT001
    (verdict,) = judged(goals(goal), sample())
    assert verdict["figure"] == pytest.approx(figure)
    assert verdict["reached"] is reached
    table = render(sample(goals=[verdict]))
    assert ("| reached |" in table) is reached
    assert ("**not reached**" in table) is not reached


def test_a_goal_against_someone_absent_or_of_another_case_has_no_verdict() -> None:
    absent = Goal(text="", ours="ours", measure="times_faster", against="absent", at_least=1)
    elsewhere = Goal(text="", ours="ours", measure="milliseconds", at_most=2, cases=("large",))
    assert judged(goals(absent, elsewhere), sample()) == []


def test_the_spread_is_over_the_cases() -> None:
    two = sample()
    two["cases"].append({**two["cases"][0], "name": "second", "contestants": [contestant("ours", [0.004])]})
    (verdict,) = judged(goals(Goal(text="", ours="ours", measure="spread", at_most=1.5)), two)
    assert verdict["figure"] == pytest.approx(2.0)
    assert verdict["reached"] is False


def test_a_matrix_has_a_row_per_case_and_one_goal_row_for_all() -> None:
    two = sample(layout="matrix")
    two["cases"].append({**two["cases"][0], "name": "second"})
    two["goals"] = judged(
        goals(Goal(text="faster", ours="ours", measure="times_faster", against="peer", at_least=1)), two
    )
    text = render(two)
    assert "| `tiny` | 2000 | 8000 | skipped | 4.00 (3.00 - 5.00) |  |" in text
    assert "| `second` |" in text
    assert text.count("| faster |") == 1
    assert "the worst of 2 (2 reach it)" in text


def test_where_ranks_wait_for_each_other_both_clocks_count() -> None:
    record = sample()
    (case,) = record["cases"]
    case["shows_wall"] = True
    ours, peer, _ = case["contestants"]
    ours["wall_s"], peer["wall_s"] = [0.010, 0.011, 0.012], [0.015, 0.022, 0.018]
    peer["wall_ratio"] = {"median": 1.5, "least": 1.5, "most": 2.0}
    goal = Goal(text="", ours="ours", measure="times_faster", against="peer", at_least=2, clock="wall_s")
    (verdict,) = judged(goals(goal), record)
    assert (verdict["figure"], verdict["reached"]) == (pytest.approx(1.5), False)
    text = render(record)
    assert "| **ours** | 2.00 | 1 | 11.00 | 1 | 3 | 1e-07 |  |  |" in text
    assert "| peer | 8.00 | 4.00 (3.00 - 5.00) | 18.00 | 1.50 (1.50 - 2.00) | 6 |" in text
    assert "| absent | skipped |  |  |  |  |  |  |  |" in text
