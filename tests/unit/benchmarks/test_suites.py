"""The benchmarks as data: everyone who is named exists, everything is compared with something of ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.command import main
from benchmarks.harness.spec import Benchmark, Contestant, Goal
from benchmarks.suites import CPU_NAMES, GPU_NAMES, benchmark
from megatron_klrl.kl.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[3]
ALL = [*CPU_NAMES, *GPU_NAMES]


@pytest.fixture(params=ALL)
def chosen(request: pytest.FixtureRequest) -> Benchmark:
    return benchmark(request.param)


def contestants(chosen: Benchmark) -> list[Contestant]:
    return [each for case in (*chosen.cases, *chosen.quick_cases) for each in case.contestants]


def test_names_are_those_of_the_registry(chosen: Benchmark) -> None:
    assert chosen.name in ALL
    assert chosen.needs_cuda == (chosen.name in GPU_NAMES)
    assert chosen.quick_cases


def test_cases_and_contestants_have_names_of_their_own(chosen: Benchmark) -> None:
    for cases in (chosen.cases, chosen.quick_cases):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert len({each.name for each in case.contestants}) == len(case.contestants)


def test_every_group_begins_with_ours(chosen: Benchmark) -> None:
    for case in (*chosen.cases, *chosen.quick_cases):
        firsts: dict[str, Contestant] = {}
        for each in case.contestants:
            firsts.setdefault(each.group, each)
        assert all(each.ours for each in firsts.values())


def test_every_factory_and_workload_is_a_function_or_class_of_its_module(chosen: Benchmark) -> None:
    """Read, not imported: most peers are not in this environment."""
    named = {each.factory for each in contestants(chosen)} | {case.workload for case in chosen.cases}
    for path in named:
        module, _, name = path.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, path


def test_options_are_keywords_of_the_factory(chosen: Benchmark) -> None:
    for each in contestants(chosen):
        module, _, name = each.factory.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        keywords = {argument.arg for argument in function.args.kwonlyargs}
        optional = {
            argument.arg
            for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            if default is not None
        }
        assert set(each.options) <= keywords, each
        assert keywords - optional <= set(each.options), each


def test_goals_speak_of_contestants_and_cases_that_exist(chosen: Benchmark) -> None:
    names = {each.name for case in chosen.cases for each in case.contestants}
    cases = {case.name for case in chosen.cases}
    for goal in chosen.goals:
        assert goal.ours in names, goal
        assert goal.against in {*names, ""}, goal
        assert set(goal.cases) <= cases, goal
        assert (goal.measure in {"times_faster", "peak_share"}) == bool(goal.against), goal


def test_a_goal_has_one_bound() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Goal(text="nothing wanted", ours="x", measure="milliseconds")
    with pytest.raises(ValueError, match="exactly one"):
        Goal(text="two things", ours="x", measure="milliseconds", at_least=1, at_most=2)


def test_what_a_peer_requires_is_in_its_environment() -> None:
    pins = (ROOT / "environment/bench.txt").read_text(encoding="utf-8")
    distributions = {
        "megatron": "megatron-core",
        "liger_kernel": "liger-kernel",
        "cut_cross_entropy": "cut-cross-entropy",
    }
    peers = [one for each in ALL for one in contestants(benchmark(each)) if not one.ours]  # ours need the trainer's
    required = {name for one in peers for name in one.requires}
    assert required >= {"trl", "verl", "megatron", "openrlhf"}
    assert [name for name in required if f"\n{distributions.get(name, name)}==" not in pins] == []


def test_every_configuration_of_the_catalogue_is_measured() -> None:
    assert [case.name for case in benchmark("kl_matrix").cases] == [entry.name for entry in catalogue()]


def test_the_command_line_says_its_first_word_without_torch() -> None:
    program = "import sys, benchmarks.command; print(*sorted({'torch', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_the_list_names_every_benchmark_and_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert [name for name in ALL if f"\n{name} " not in f"\n{text}"] == []
    assert "verl, FusedLinearForPPO" in text


def test_run_py_works_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "no_such_benchmark"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there are: all, gpu, loss_logits" in done.stderr


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_no_turn_and_no_thread_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["loss_logits", option, "0"])
    assert f"{option}: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which benchmark"),
        (["no_such"], "no benchmark 'no_such'"),
        (["loss_logits", "--case", "float8"], "no case 'float8'"),
        (["all", "--json", __file__], "name a folder"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_the_gpu_benchmarks_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["gpu"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
