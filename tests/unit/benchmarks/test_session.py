"""A whole run with real processes: who works has figures, who does not is named, and nobody is silently left out."""

import json
from typing import Any

import pytest

from benchmarks.command import run
from benchmarks.harness.record import failures
from benchmarks.harness.session import Effort, Entry
from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance
from benchmarks.harness.tables import render
from benchmarks.harness.worker import Worker

HERE = "tests.unit.benchmarks.contestants"
GOOD = Contestant(name="good", factory="benchmarks.peers.naive:from_logits", ours=True)
PEER = Contestant(name="peer", factory="benchmarks.peers.naive:from_logits")
CONTESTANTS = (
    GOOD,
    PEER,
    Contestant(name="wrong", factory=f"{HERE}:wrong"),
    Contestant(name="ends later", factory=f"{HERE}:ends_later"),
    Contestant(name="not installed", factory="nobody:nothing", requires=("no_such_library",)),
)
TOLERANCE = Tolerance(loss=1e-5, values=1e-5, gradient=1e-4)
BENCHMARK = Benchmark(
    name="sample",
    summary="a run of the test",
    cases=(
        Case(
            name="tiny",
            workload="benchmarks.workloads.logits:Logits",
            parameters={"batch": 2, "tokens": 4, "vocab": 64, "dtype": "float32"},
            tolerance=TOLERANCE,
            contestants=CONTESTANTS,
        ),
    ),
    quick_cases=(),
    goals=(Goal(text="a thousand times faster", ours="good", measure="times_faster", against="peer", at_least=1000),),
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(json.dumps(run(BENCHMARK, Effort(rounds=3, calls=2, threads=1), quick=False)))


@pytest.fixture(scope="module")
def found(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in record["cases"][0]["contestants"]}


@pytest.mark.slow
def test_everyone_is_in_the_record(found: dict[str, dict[str, Any]]) -> None:
    assert list(found) == [each.name for each in CONTESTANTS]


@pytest.mark.slow
def test_who_works_has_a_figure_for_every_turn(found: dict[str, dict[str, Any]]) -> None:
    for name in ("good", "peer"):
        assert len(found[name]["seconds"]) == 3
        assert min(found[name]["seconds"]) > 0
        assert found[name]["differences"].keys() == {
            "loss", "values/logprobs", "values/entropy", "gradients/logits",
        }  # fmt: skip
    pairs = zip(found["peer"]["seconds"], found["good"]["seconds"], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    assert found["peer"]["compared_with"] == "good"
    assert found["peer"]["ratio"] == {"median": ratios[1], "least": ratios[0], "most": ratios[2]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "not in parity: loss differs by"),
        ("ends later", "exit code 7 at 'measure'"),
    ],
)
def test_who_fails_has_no_figure_and_a_reason(
    record: dict[str, Any], found: dict[str, dict[str, Any]], name: str, why: str
) -> None:
    assert why in found[name]["failed"]
    assert "seconds" not in found[name]
    assert sum(f"tiny | {name}: " in line for line in failures(record)) == 1


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_skipped_with_a_reason_and_a_remedy(
    record: dict[str, Any], found: dict[str, dict[str, Any]]
) -> None:
    assert "no_such_library" in found["not installed"]["skipped"]
    assert "install.sh .venv-bench bench" in found["not installed"]["skipped"]
    assert len(failures(record)) == 2


@pytest.mark.usefixtures("alone")
def test_a_module_that_is_missing_late_skips_a_peer_and_fails_ours() -> None:
    worker = Worker(0)
    worker.prepare(workload=BENCHMARK.cases[0].workload, parameters=dict(BENCHMARK.cases[0].parameters))
    missing = worker.enter(factory=f"{HERE}:lacks_a_part", options={})
    assert missing["missing"] == "late_part"
    peer, ours = Entry(contestant=PEER), Entry(contestant=GOOD)
    peer.reject(missing)
    ours.reject(missing)
    assert "late_part" in peer.skipped
    assert not peer.failed
    assert "late_part" in ours.failed
    assert not ours.skipped


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 3.0), ("cuda", 2.0)])
def test_cpu_time_adds_up_over_ranks_and_memory_does_not(device: str, seconds: float) -> None:
    entry = Entry(contestant=GOOD)
    readings = [{"seconds": 1.0, "wall_s": 4.0, "peak_bytes": 10}, {"seconds": 2.0, "wall_s": 3.0, "peak_bytes": 20}]
    entry.add(readings, device=device)
    assert (entry.seconds, entry.wall_s, entry.peak_bytes) == ([seconds], [4.0], 20)


@pytest.mark.slow
def test_a_goal_that_is_missed_is_said_and_fails_nothing(record: dict[str, Any]) -> None:
    (goal,) = record["goals"]
    assert goal["case"] == "tiny"
    assert goal["reached"] is False
    assert 0 < goal["figure"] < 1000


@pytest.mark.slow
def test_the_record_says_where_and_with_what(record: dict[str, Any]) -> None:
    assert record["clock"].startswith("process CPU time")
    assert record["threads"] == 1
    assert record["machine"]["cores"] >= 1
    assert "torch" in record["versions"]
    assert record["ceilings"]["copy_bytes_per_s"] > 1e8
    assert record["ceilings"]["gemm_flops_per_s"] > 1e8


@pytest.mark.slow
def test_the_table_names_everyone_and_prints_no_number_for_who_has_none(record: dict[str, Any]) -> None:
    lines = render(record).splitlines()
    rows = {line.split("|")[1].strip(" *"): line for line in lines if line.startswith("| ")}
    assert all(each.name in rows for each in CONTESTANTS)
    assert "no figure" in rows["wrong"]
    assert "skipped" in rows["not installed"]
    assert any("was skipped" in line and "no_such_library" in line for line in lines)
