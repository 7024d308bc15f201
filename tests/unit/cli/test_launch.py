import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_klrl.config.load import load_recipe
from tests.unit.cli.programs import RECIPE, ROOT, klrl, klrl_here

CLUSTER = "gpus_per_node: 0\nranks_per_node: 2\ncpus_per_rank: 1\n"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Nodes with two ranks."""
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    return file


def slurm_tools(folder: Path, *, queue: str = "", refuses: bool = False) -> str:
    """A PATH whose sbatch notes what it gets, and whose squeue knows one state."""
    folder.mkdir()
    answer = "echo 'Batch job submission failed: Invalid account' >&2; exit 1" if refuses else "echo '4711;cluster'"
    programs = {"sbatch": f'cp "$2" {folder}/submitted\n{answer}', "squeue": f"echo {queue}"}
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["kl.bta=1"], "kl.bta: unknown key"),
        (["parallel.tensor=4"], "parallel.tensor: 4 does not divide the model's 2 attention heads"),
        (["--nodes", "3", "parallel.pipeline=2"], "= 4 does not divide the 6 ranks"),
        (["generation.sleep=true"], "generation.sleep"),
        (["--time", "soon"], "time: is 'soon', expected a time such as"),
        (["--array", "2"], "--array: splits a study. Fix: add --kind study"),
        (["--hf", "x"], "--hf: says what to evaluate. Fix: add --kind eval"),
        (["--kind", "eval", "--resume"], "--resume: continues a training"),
        (["--kind", "study", "kl.beta=1"], "KEY=VALUE: 'kl.beta=1' changes a recipe, and a study has many"),
        (["--kind", "study", "--nodes", "2"], "nodes: is 2, but a shard of a study runs on one node"),
        (["--resume", "--run-dir", "nope"], "--run-dir: nope holds no run to resume"),
        (["--run-dir", "x:y"], "x:y' holds what a batch script, PYTHONPATH or a list of mounts cannot"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tmp_path: Path, cluster: Path, arguments: list[str], expected: str
) -> None:
    done = klrl_here("launch", "slurm", RECIPE, "--cluster", cluster, *arguments, "--dry-run", cwd=tmp_path)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.yaml"]


def test_a_cluster_file_is_needed(tmp_path: Path) -> None:
    done = klrl_here("launch", "slurm", RECIPE, cwd=tmp_path)
    assert (done.exit_code, "--cluster: is needed for SLURM" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cluster", "c.yaml"], "--cluster: is for SLURM. Fix: add --executor slurm, or leave --cluster away"),
        (["--detach"], "--detach: is for SLURM"),
        (["--executor", "slurm"], "--cluster: is needed for SLURM"),
        (["kl.bta=1"], "kl.bta: unknown key"),
    ],
)
def test_mistakes_with_nemo_run_are_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    """An empty module stands for NeMo-Run: nothing of it is reached."""
    monkeypatch.setitem(sys.modules, "nemo_run", ModuleType("nemo_run"))
    done = klrl_here("launch", "nemo-run", RECIPE, *arguments, cwd=tmp_path)
    assert done.exit_code == 2
    assert expected in done.stderr


def test_without_nemo_run_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)  # makes the import fail, installed or not
    done = klrl_here("launch", "nemo-run", RECIPE, cwd=tmp_path)
    assert done.exit_code == 2
    assert "NeMo-Run cannot be imported" in done.stderr
    assert "pip install 'megatron-klrl[nemo-run]'" in done.stderr


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, cluster: Path) -> None:
    done = klrl_here("launch", "slurm", RECIPE, "--cluster", cluster, "--nodes", "2", "--dry-run", cwd=tmp_path)
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2\n" in done.stdout
    assert "--nnodes=2 --nproc-per-node=2" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.yaml"]


def test_a_dry_run_as_json(tmp_path: Path, cluster: Path) -> None:
    arguments = ["launch", "slurm", RECIPE, "--cluster", cluster, "--run-dir", "out", "--dry-run", "--json"]
    plan = json.loads(klrl_here(*arguments, cwd=tmp_path).stdout)
    assert plan["run_dir"] == str(tmp_path / "out")
    assert (plan["nodes"], plan["ranks_per_node"], plan["kind"]) == (1, 2, "train")
    assert plan["script"].startswith("#!/bin/bash\n")


def test_tensor_groups_across_nodes_are_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "single.yaml"
    file.write_text(CLUSTER.replace("ranks_per_node: 2", "ranks_per_node: 1"))
    done = klrl_here("launch", "slurm", RECIPE, "--cluster", file, "--nodes", "2", "--dry-run", cwd=tmp_path)
    assert "warning: parallel.tensor is 2, but a node has 1 ranks" in done.stderr


def test_without_slurm_it_says_where_to_go(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = klrl_here("launch", "slurm", RECIPE, "--cluster", cluster, cwd=tmp_path)
    assert done.exit_code == 2
    assert "there is no sbatch on PATH. Fix: start it on a login node of the cluster" in done.stderr


def test_a_submission_leaves_everything_the_job_needs(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "bin"))
    done = klrl_here("launch", "slurm", RECIPE, "loop.steps=7", "--cluster", cluster, "--run-dir", "out", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("klrl launch: job 4711: arithmetic_cpu: 1 nodes x 2 ranks: ")
    for command in ("tail -F", "squeue --jobs=4711", "scancel 4711", "scancel --signal=INT --batch 4711", "--resume"):
        assert command in done.stdout
    run = tmp_path / "out"
    script = (run / "slurm" / "train.sbatch").read_text()
    assert (tmp_path / "bin" / "submitted").read_text() == script
    resolved = load_recipe(RECIPE, ["loop.steps=7"])
    assert load_recipe(run / "slurm" / "arithmetic_cpu.yaml") == resolved
    assert load_recipe(run / "config.yaml") == resolved
    copied = (run / "code" / "megatron_klrl" / "cli" / "launch.py").read_text()
    assert copied == (ROOT / "megatron_klrl" / "cli" / "launch.py").read_text()


def test_the_copy_is_what_the_job_imports(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder of the checkout itself, whose own package would otherwise come first."""
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "bin"))
    klrl_here("launch", "slurm", RECIPE, "--cluster", cluster, "--run-dir", tmp_path / "out", cwd=ROOT)
    copy = tmp_path / "out" / "code" / "megatron_klrl" / "__init__.py"
    copy.write_text("__version__ = 'of the copy'\n" + copy.read_text().replace("__version__", "_other"))
    script = (tmp_path / "out" / "slurm" / "train.sbatch").read_text()
    exports = "\n".join(line for line in script.splitlines() if line.startswith(("cd ", "export PYTHONPATH")))
    shell = f'{exports}\n"$0" -P -m megatron_klrl.cli --version'
    done = subprocess.run(["bash", "-c", shell, sys.executable], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "of the copy"


def test_a_refused_submission_is_one_message(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "bin", refuses=True))
    done = klrl_here("launch", "slurm", RECIPE, "--cluster", cluster, "--run-dir", "out", cwd=tmp_path)
    assert (done.exit_code, done.stderr) == (1, "klrl: sbatch: Batch job submission failed: Invalid account\n")


def test_a_live_job_keeps_its_run_directory(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["launch", "slurm", RECIPE, "--cluster", cluster, "--run-dir", "out"]
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "first"))
    assert klrl_here(*arguments, cwd=tmp_path).exit_code == 0
    used = klrl_here(*arguments, cwd=tmp_path)
    assert "already holds a run. Fix: add --resume" in used.stderr
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "busy", queue="RUNNING"))
    busy = klrl_here(*arguments, "--resume", cwd=tmp_path)
    assert (busy.exit_code, "job 4711 of" in busy.stderr, "is still RUNNING" in busy.stderr) == (2, True, True)
    monkeypatch.setenv("PATH", slurm_tools(tmp_path / "ended"))
    assert klrl_here(*arguments, "--resume", "loop.steps=9", cwd=tmp_path).exit_code == 0
    run = tmp_path / "out"
    assert load_recipe(run / "slurm" / "arithmetic_cpu.yaml").loop.steps == 9
    assert load_recipe(run / "config.yaml").loop.steps == 100, "the trainer compares, and says what has changed"


def test_an_evaluation_gets_absolute_weights(tmp_path: Path, cluster: Path) -> None:
    arguments = ["launch", "slurm", RECIPE, "--cluster", cluster, "--kind", "eval", "--checkpoint", "a b", "--dry-run"]
    script = klrl_here(*arguments, cwd=tmp_path).stdout
    assert f"--checkpoint '{tmp_path}/a b'" in script
    assert "requeues=" not in script


def test_a_study_is_checked_and_goes_on_in_its_folder(tmp_path: Path, cluster: Path) -> None:
    """By the command that will run it: every cell."""
    tour = ROOT / "examples" / "studies" / "tour_cpu.yaml"
    arguments = ["--kind", "study", "--array", "4", "--cluster", cluster, "--dry-run"]
    (tmp_path / "runs" / "tour_cpu" / "some-run").mkdir(parents=True)
    done = klrl_here("launch", "slurm", tour, *arguments, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "#SBATCH --array=0-3\n" in done.stdout
    assert f"--out {tmp_path / 'runs' / 'tour_cpu'} --shard" in done.stdout
    wrong = klrl_here("launch", "slurm", tour.with_name("tour.yaml"), *arguments, cwd=tmp_path)
    assert wrong.exit_code == 2
    assert "did you mean" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_help_shows_an_example(tmp_path: Path) -> None:
    done = klrl("launch", "slurm", "--help", cwd=tmp_path)
    assert "Example: klrl launch slurm recipe.yaml --cluster cluster.yaml" in done.stdout
