import json
from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from tests.unit.cli.programs import RECIPE, klrl, klrl_here
from tests.unit.config.folders import make_recipe


def noted(notes: Path, name: str) -> dict[str, object]:
    return dict(json.loads((notes / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["kl.bta=1"], "kl.bta: unknown key. Fix: did you mean kl.beta?"),
        (["loop.steps=many"], "loop.steps: is 'many', expected a whole number. Fix: "),
        (["kl.placement=loss"], "means nothing"),
        (["kl.estimator=k3"], "Fix: set kl.placement=both, or kl.allow_biased=true"),
        (["parallel.tensor=4"], "parallel.tensor: 4 does not divide the model's 2 attention heads. Fix: "),
        (["launch.ranks=3"], "parallel: tensor 2 x pipeline 1 x context 1 = 2 does not divide the 3 ranks. Fix: "),
        (["precision.fp8=tensorwise", "precision.dtype=bf16"], "precision.fp8: is tensorwise, but there is no GPU"),
        (["model.path=/nope"], "model.path: there is no folder /nope. Fix: "),
        (["model.path=embedded:nope"], "embedded:arithmetic"),
        (["data.train={task: jsonl, path: nope.jsonl}"], "data.train.path: there is no file nope.jsonl. Fix: "),
        (["checkpoint.keep_best=reward/mean"], "checkpoint.keep_best: is reward/mean, but without checkpoint.keep"),
        (
            ["checkpoint.keep=1", "checkpoint.keep_best=reward"],
            "keep_best: there is no metric reward. Fix: ",
        ),
        (["generation.max_tokens=60"], "generation.max_tokens: 60 response tokens"),
        (["steps"], "write key=value"),
        (["--json"], "--json: goes with --dry-run only. Fix: "),
        (["--resume"], "--resume: no earlier run runs/arithmetic_cpu-* to resume. Fix: "),
        (["--resume", "--run-dir", "nope"], "--run-dir: nope holds no run to resume"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(tmp_path: Path, overrides: list[str], expected: str) -> None:
    done = klrl_here("train", RECIPE, *overrides, cwd=tmp_path)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    done = klrl("train", RECIPE.with_name("arithmetic_gpu.yml"), cwd=tmp_path)
    assert done.returncode == 2
    assert f"did you mean {RECIPE}" in done.stderr


def test_traceback_on_request(tmp_path: Path) -> None:
    done = klrl("train", RECIPE, "kl.bta=1", "--traceback", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("klrl: kl.bta: unknown key")


def test_a_dry_run_tells_everything_and_starts_nothing(tmp_path: Path) -> None:
    done = klrl("train", RECIPE, "kl.beta=0.25", "--dry-run", cwd=tmp_path, notes=tmp_path / "notes")
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "beta: 0.25",
        "layout: 2 ranks (TP 2 x PP 1 x DP 1)",
        "KL: k1 in reward, credit to_go, beta 0.25",
        "KL verdict: follows the gradient of the sequence-level KL on-policy",
        "an estimate",
        "nothing was started",
    ):
        assert part in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]
    assert not list((tmp_path / "notes").glob("*.json"))


def test_a_dry_run_as_json(tmp_path: Path) -> None:
    arguments = ["train", RECIPE, "kl.estimator=k3", "kl.allow_biased=true", "--dry-run", "--json"]
    done = klrl_here(*arguments, cwd=tmp_path)
    plan = json.loads(done.stdout)
    sizes = {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1, "data": 1}
    assert plan["layout"] == {"ranks": 2, **sizes}
    assert plan["config"]["kl"]["estimator"] == "k3"
    assert plan["kl"]["verdict"].startswith("biased")
    assert len(plan["warnings"]) == 1
    assert plan["memory_estimate"]["parameters"] > 200_000


def test_train_starts_the_ranks_on_the_resolved_recipe(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    done = klrl("train", RECIPE, "loop.steps=3", "--run-dir", "out", cwd=tmp_path, notes=notes)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first == (
        "klrl train: arithmetic_cpu: 2 ranks (TP 2 x PP 1 x DP 1), KL: k1 in reward, credit to_go, beta 0.1 -> out"
    )
    for rank in (0, 1):
        assert noted(notes, f"train-{rank}") == {"steps": 3, "run_dir": "out", "resume": False}
    assert load_recipe(tmp_path / "out" / "config.yaml") == load_recipe(RECIPE, ["loop.steps=3"])


def test_one_rank_needs_no_launcher(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    done = klrl("train", make_recipe(tmp_path), cwd=tmp_path, notes=notes)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-20")
    assert noted(notes, "train-none")["run_dir"] == f"runs/{run.name}"


@pytest.mark.parametrize(
    ("fate", "code", "expected"),
    [
        ("user-1", 2, "klrl: data.train: too long. Fix: shorten it\n"),
        ("work-0", 1, "klrl: the loss is not finite\n"),
        ("work-1", 1, "klrl: the loss is not finite\n"),
    ],
)
def test_a_failing_rank_gives_one_message_and_its_code(tmp_path: Path, fate: str, code: int, expected: str) -> None:
    done = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, notes=tmp_path / "notes", FATE=fate)
    assert (done.returncode, done.stderr) == (code, expected)


@pytest.mark.parametrize(("rank", "log"), [(0, "out/log.txt"), (1, "out/logs/rank1.txt")])
def test_a_bug_in_a_rank_is_code_1_and_leaves_its_traceback_in_the_log(tmp_path: Path, rank: int, log: str) -> None:
    done = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, notes=tmp_path / "notes", FATE=f"bug-{rank}")
    assert done.returncode == 1
    assert done.stderr == f"klrl: rank {rank}: RuntimeError: broken (traceback in {log})\n"
    assert (tmp_path / log).read_text().count("Traceback") == 1


@pytest.mark.parametrize(("fate", "code"), [("user-none", 2), ("work-none", 1)])
def test_a_single_process_fails_the_same_way(tmp_path: Path, fate: str, code: int) -> None:
    done = klrl("train", make_recipe(tmp_path), cwd=tmp_path, notes=tmp_path / "notes", FATE=fate)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1


def test_under_torchrun_a_process_joins(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, notes=notes, **place)
    assert (done.returncode, done.stdout) == (0, "")
    assert noted(notes, "train-1")["run_dir"] == "out"
    failed = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, notes=notes, FATE="user-1", **place)
    assert (failed.returncode, failed.stderr) == (2, "klrl: data.train: too long. Fix: shorten it\n")
    silent = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, notes=notes, FATE="user-1", **place)
    assert (silent.returncode, silent.stderr) == (2, ""), "a later rank only sees the consequence"


def test_a_world_that_does_not_fit_is_refused_in_a_rank_too(tmp_path: Path) -> None:
    done = klrl("train", RECIPE, "--run-dir", "out", cwd=tmp_path, RANK="0", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    assert done.returncode == 2
    assert "does not divide the 3 ranks" in done.stderr


def test_half_a_launcher_environment_is_refused(tmp_path: Path) -> None:
    done = klrl("train", RECIPE, cwd=tmp_path, RANK="0")
    assert done.returncode == 2
    assert "WORLD_SIZE" in done.stderr
    assert "Fix: " in done.stderr


def test_a_used_run_dir_is_refused_and_resume_takes_it(tmp_path: Path) -> None:
    notes, recipe = tmp_path / "notes", make_recipe(tmp_path)
    assert klrl("train", recipe, "--run-dir", "out", cwd=tmp_path, notes=notes).returncode == 0
    used = klrl("train", recipe, "--run-dir", "out", cwd=tmp_path, notes=notes)
    assert used.returncode == 2
    assert "--run-dir: out already holds a run. Fix: add --resume" in used.stderr
    resumed = klrl("train", recipe, "loop.steps=9", "--run-dir", "out", "--resume", cwd=tmp_path, notes=notes)
    assert resumed.returncode == 0
    assert resumed.stderr == "klrl: warning: resumed with loop.steps: 2 -> 9\n"
    assert noted(notes, "train-none") == {"steps": 9, "run_dir": "out", "resume": True}
    (earlier,) = (tmp_path / "out").glob("config.until-*.yaml")
    assert load_recipe(earlier).loop.steps == 2
    newest = klrl("train", recipe, "--resume", cwd=tmp_path, notes=notes)
    assert newest.returncode == 2, "out is not a run of the default name"
