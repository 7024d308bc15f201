"""The report of an evaluation: numbers, table, file."""

import json
from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.loop.eval_report import (
    EvalReport,
    as_json,
    recipe_sha256,
    report_set,
    table,
    weights_sha256,
    write_beside,
)
from megatron_klrl.loop.evaluation import SetRewards

RECIPE = Path(__file__).parents[3] / "examples" / "recipes" / "arithmetic_cpu.yaml"


def report() -> EvalReport:
    far = SetRewards(rewards=[[0.0], [1.0], [1.0], [1.0]], verifier_timeouts=1, verifier_errors=2)
    near = SetRewards(rewards=[[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], verifier_timeouts=0, verifier_errors=0)
    return EvalReport(
        source="runs/first/hf",
        weights_sha256="ab" * 32,
        recipe_sha256="cd" * 32,
        sets={
            "far": report_set(far, out_of_distribution=True, temperature=0.5),
            "near": report_set(near, out_of_distribution=False, temperature=1.0),
        },
    )


def test_numbers_by_hand() -> None:
    """near: 1 and 2 of 4 right. pass@2 = 1 - 3/6 and 1 - 1/6: mean 2/3, half their difference 1/6 = standard error."""
    near = as_json(report())["sets"]["near"]
    assert near["accuracy"] == 0.375
    assert {k: found["value"] for k, found in near["pass_at_k"].items()} == {
        "1": pytest.approx(0.375),
        "2": pytest.approx(2 / 3),
        "4": 1.0,
    }
    low, high = near["pass_at_k"]["2"]["interval_95"]
    assert (low, high) == (pytest.approx(2 / 3 - 1.959963984540054 / 6), pytest.approx(0.99332733))
    assert (near["prompts"], near["samples"], near["temperature"]) == (2, 4, 1.0)


def test_table() -> None:
    lines = table(report())
    assert lines[0].split("  ")[0] == "set"
    assert lines[1].split() == [
        "near", "in", "2", "x", "4", "0.375", "[0.130,", "0.620]", "0.375", "[0.130,", "0.620]",
        "0.667", "[0.340,", "0.993]", "1.000", "[0.224,", "1.000]",
    ]  # fmt: skip
    assert lines[2].split() == ["far", "out", "4", "x", "1", *["0.750", "[0.260,", "1.000]"] * 2, "-", "-"]
    assert lines[3] == "far: 1 verifications took too long and 2 failed; they count as 0"
    assert lines[-1] == "weights abababababababab: runs/first/hf"


def test_the_file_lies_beside_the_weights_and_names_the_recipe(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoints" / "step_000020"
    weights.mkdir(parents=True)
    file = write_beside(weights, report())
    assert file == tmp_path / "checkpoints" / "step_000020.eval-cdcdcdcd.json"
    assert json.loads(file.read_text()) == json.loads(json.dumps(as_json(report())))


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"the evaluation is done, but .* cannot be written: No such file"):
        write_beside(tmp_path / "gone" / "hf", report())


def test_identities_change_with_what_they_identify() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe_sha256(recipe) == recipe_sha256(load_recipe(RECIPE))
    assert recipe_sha256(recipe) != recipe_sha256(load_recipe(RECIPE, ["data.eval.id.samples=8"]))
    assert weights_sha256({"a": "1", "b": "2"}) == weights_sha256({"b": "2", "a": "1"})
    assert weights_sha256({"a": "1", "b": "2"}) != weights_sha256({"a": "2", "b": "1"})
