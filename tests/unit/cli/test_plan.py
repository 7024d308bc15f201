import json
from pathlib import Path

from tests.unit.cli.programs import RECIPE, klrl_here
from tests.unit.planning.configs import DEEPSEEK_V3, write


def test_a_plan_of_the_recipes_layout(tmp_path: Path) -> None:
    done = klrl_here("plan", RECIPE, "--gpus", "2", "--gpu-memory-gib", "131", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    for part in ("TP 2 x PP 1 x DP 1", "gradients", "key-value cache", "fits: ", "assumed of h200", "bottleneck: "):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_as_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "v3", DEEPSEEK_V3)
    settings = ["precision.dtype=bf16", f"model.path={folder}", "parallel.expert=64", "parallel.sequence=true"]
    sizes = ["--gpus", "64", "--gpu-memory-gib", "80", "--response-tokens", "10", "--assume", "memory_share=0.5"]
    done = klrl_here("plan", RECIPE, *settings, *sizes, "--json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["trainable"] is False
    assert found["fits"] is False
    assert found["work"]["response"] == 10
    assert found["hardware"]["memory_share"] == 0.5
    assert set(found["memory_bytes"]) == set(found["seconds"]) == {"generate", "score", "train", "sync"}
    assert found["peak"]["bytes"] == max(phase["total"] for phase in found["memory_bytes"].values())


def test_layouts_that_fit(tmp_path: Path) -> None:
    done = klrl_here("plan", RECIPE, "--gpus", "4", "--layouts", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["fitting"] >= len(found["layouts"]) > 3
    text = klrl_here("plan", RECIPE, "--gpus", "4", "--layouts", cwd=tmp_path).stdout
    assert f"{found['fitting']} layouts fit" in text


def test_nothing_fits(tmp_path: Path) -> None:
    done = klrl_here("plan", RECIPE, "--gpus", "2", "--gpu-memory-gib", "2", "--layouts", cwd=tmp_path)
    assert done.exit_code == 1
    assert "no layout fits 2 GPUs of 2.0 GiB; the one that needs least is TP" in done.stderr


def test_bad_input_names_the_field(tmp_path: Path) -> None:
    cases = {
        ("--gpus", "3"): "parallel: 2 does not divide 3 GPUs",
        ("--gpus", "2", "--gpu", "x"): "--gpu: there is no GPU 'x'",
        ("--gpus", "2", "model.path=nowhere"): "model.path: there is no config.json at nowhere",
    }
    for arguments, expected in cases.items():
        done = klrl_here("plan", RECIPE, *arguments, cwd=tmp_path)
        assert done.exit_code == 2
        assert expected in done.stderr
