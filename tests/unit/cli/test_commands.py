import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klrl import __version__
from tests.unit.cli.programs import RECIPE, ROOT, klrl, klrl_here
from tests.unit.config.folders import make_folder, make_recipe

COMMANDS = (
    ["train"],
    ["eval"],
    ["export"],
    ["doctor"],
    ["audit"],
    ["config", "show"],
    ["config", "diff"],
    ["config", "presets"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(tmp_path: Path, command: list[str]) -> None:
    done = klrl_here(*command, "--help", cwd=tmp_path)
    assert done.exit_code == 0
    assert f"Example: klrl {' '.join(command)}" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from megatron_klrl.cli.main import app; "
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'numpy', 'transformers', 'vllm', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(tmp_path: Path) -> None:
    assert klrl_here("--version", cwd=tmp_path).stdout.strip() == __version__


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "--nope"], ["export", "x"]])
def test_a_wrong_command_line_is_code_2(tmp_path: Path, arguments: list[str]) -> None:
    done = klrl_here(*arguments, cwd=tmp_path)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


def test_config_show_is_the_resolved_recipe(tmp_path: Path) -> None:
    text = klrl_here("config", "show", RECIPE, "kl.beta=0.3", cwd=tmp_path).stdout
    (tmp_path / "again.yaml").write_text(text)
    as_json = klrl_here("config", "show", tmp_path / "again.yaml", "--json", cwd=tmp_path).stdout
    resolved = json.loads(as_json)
    assert resolved["kl"]["beta"] == 0.3
    sizes = {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1}
    assert resolved["parallel"] == {**sizes, "sequence": False}


def test_config_diff(tmp_path: Path) -> None:
    left = make_recipe(tmp_path)
    right = make_recipe(tmp_path, left.read_text() + "kl: {beta: 0.5}\n", "right.yaml")
    assert klrl_here("config", "diff", left, left, cwd=tmp_path).stdout == "no difference\n"
    assert klrl_here("config", "diff", left, right, cwd=tmp_path).stdout == "kl.beta  0.05 -> 0.5\n"
    as_json = klrl_here("config", "diff", left, right, "--json", cwd=tmp_path).stdout
    assert json.loads(as_json) == [{"path": "kl.beta", "left": 0.05, "right": 0.5}]


def test_config_presets(tmp_path: Path) -> None:
    table = klrl_here("config", "presets", cwd=tmp_path).stdout
    listed = {
        preset["name"]: preset for preset in json.loads(klrl_here("config", "presets", "--json", cwd=tmp_path).stdout)
    }
    for name, preset in listed.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[2:4] == list(preset["verdicts"].values())
    assert listed["grpo-deepseekmath"]["kl"]["beta"] == 0.04
    assert listed["grpo-deepseekmath"]["flags"]["beta = 0.04"] == {"kl.beta": 0.04}
    assert listed["paper-k1-loss"]["verdicts"] == {"sequence": "zero", "token": "zero"}


def test_a_biased_preset_is_code_2_and_names_what_is_not(tmp_path: Path) -> None:
    done = klrl_here("train", RECIPE, "preset=paper-k3-loss", "--dry-run", cwd=tmp_path)
    assert done.exit_code == 2
    assert "Fix: set kl.placement=both" in done.stderr
    assert (
        klrl_here("train", RECIPE, "preset=paper-k3-loss", "kl.allow_biased=true", "--dry-run", cwd=tmp_path).exit_code
        == 0
    )


@pytest.mark.parametrize("command", [["show"], ["diff", str(RECIPE)]])
def test_config_of_a_missing_recipe(tmp_path: Path, command: list[str]) -> None:
    done = klrl_here("config", *command, "nope.yaml", cwd=tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith("klrl: nope.yaml: no such file. Fix: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--checkpoint", "a", "--hf", "b"], "--checkpoint: --checkpoint and --hf exclude each other. Fix: "),
        (["--checkpoint", "a"], "--checkpoint: there is no folder a. Fix: "),
        (["--hf", "b"], "model.path: there is no folder b. Fix: "),
        (["data.eval={}"], "data.eval: has no evaluation set. Fix: "),
        (["kl.bta=1"], "kl.bta: unknown key"),
    ],
)
def test_bad_input_to_eval(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = klrl_here("eval", RECIPE, *arguments, cwd=tmp_path)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_eval_in_ranks_leaves_no_folder_behind(tmp_path: Path) -> None:
    notes, scratch = tmp_path / "notes", tmp_path / "scratch"
    scratch.mkdir()
    hf = make_folder(tmp_path / "hf")
    done = klrl("eval", RECIPE, "--hf", hf, "--json", cwd=tmp_path, notes=notes, TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "with --json, only the ranks' JSON goes to standard output"
    assert done.stderr.startswith("klrl eval: arithmetic_cpu: 2 ranks")
    for rank in (0, 1):
        note = json.loads((notes / f"eval-{rank}.json").read_text())
        assert note == {"sets": ["id", "long", "op", "rev"], "checkpoint": None, "hf": str(hf), "json": True}
    assert list(scratch.iterdir()) == []


def test_eval_that_fails_keeps_and_names_the_output(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = klrl("eval", RECIPE, cwd=tmp_path, notes=tmp_path / "notes", TMPDIR=str(scratch), FATE="work-1")
    assert done.returncode == 1
    (folder,) = scratch.iterdir()
    assert f"output of the ranks: {folder}" in done.stderr
    assert (folder / "logs" / "rank1.txt").exists()


def test_eval_in_one_process(tmp_path: Path) -> None:
    notes, checkpoint = tmp_path / "notes", tmp_path / "checkpoint"
    checkpoint.mkdir()
    done = klrl("eval", make_recipe(tmp_path), "--checkpoint", checkpoint, cwd=tmp_path, notes=notes)
    assert done.returncode == 0, done.stderr
    note = json.loads((notes / "eval-none.json").read_text())
    assert note == {"sets": ["id"], "checkpoint": str(checkpoint), "hf": None, "json": False}


def test_export(tmp_path: Path) -> None:
    notes, checkpoint, to = tmp_path / "notes", tmp_path / "checkpoint", tmp_path / "to"
    missing = klrl("export", checkpoint, "--to", to, cwd=tmp_path, notes=notes)
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"klrl: CHECKPOINT: there is no folder {checkpoint}. Fix: ")
    checkpoint.mkdir()
    to.mkdir()
    done = klrl("export", checkpoint, "--to", to, "--json", cwd=tmp_path, notes=notes)
    assert json.loads(done.stdout) == {"checkpoint": str(checkpoint), "to": str(to)}
    assert json.loads((notes / "export-none.json").read_text()) == {"checkpoint": str(checkpoint), "to": str(to)}
    (to / "file").touch()
    used = klrl("export", checkpoint, "--to", to, cwd=tmp_path, notes=notes)
    assert used.returncode == 2
    assert "--to: " in used.stderr
    assert "Fix: give a new folder" in used.stderr
