"""Names of layouts, and what the comparison says of a difference."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.recipe import Dtype, Fp8, PrecisionSection, Recompute
from megatron_klrl.diagnostics.layout_check import BOUND, compare
from megatron_klrl.diagnostics.layouts import default_layouts, named_layout
from megatron_klrl.errors import UserError

RECIPE = load_recipe("examples/recipes/arithmetic_cpu.yaml")


@pytest.mark.parametrize(
    ("name", "ranks", "sizes"),
    [
        ("one", 1, {}),
        ("tp2pp2", 4, {"tensor": 2, "pipeline": 2}),
        ("pp2-vp2", 2, {"pipeline": 2, "virtual_pipeline": 2}),
        ("tp2sp-cp2", 4, {"tensor": 2, "context": 2, "sequence": True}),
        ("dp3", 3, {}),
        ("ep2", 2, {"expert": 2}),
        ("dp2ep2", 2, {"expert": 2}),
    ],
)
def test_a_name_says_the_whole_layout(name: str, ranks: int, sizes: dict[str, int]) -> None:
    """Whatever the recipe's own layout is, what the name leaves out is one."""
    found = named_layout(name, RECIPE, longest_row=30)
    assert found.ranks == ranks
    parallel = found.recipe.parallel
    plain = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1, "sequence": False}
    assert parallel.model_dump() == plain | sizes
    assert found.recipe.precision.dtype is Dtype.FP32
    assert found.recipe.launch.ranks == ranks


def test_comparisons_are_in_float32_whatever_the_recipe_rounds_to() -> None:
    rounded = PrecisionSection(fp8=Fp8.TENSORWISE, first_last_bf16=True, fp8_primary_weights=True)
    found = named_layout("tp2", RECIPE.model_copy(update={"precision": rounded}), longest_row=30)
    assert found.recipe.precision == PrecisionSection(dtype=Dtype.FP32)


def test_rows_and_recompute_are_part_of_a_name() -> None:
    packed = named_layout("cp2-packed-recompute", RECIPE, longest_row=29).recipe
    assert packed.loop.micro_batch_size is None
    assert packed.loop.tokens_per_microbatch == 2 * 32, "two rows of 29 tokens, each padded to a multiple of 4"
    assert packed.memory.recompute is Recompute.FULL
    assert named_layout("mb3", RECIPE, longest_row=29).recipe.loop.micro_batch_size == 3


@pytest.mark.parametrize("name", ["", "tp", "tp0", "xp2", "tp2pp", "tp2--pp2", "packed3"])
def test_what_is_no_layout_is_said_to_be_none(name: str) -> None:
    with pytest.raises(UserError, match=r"is not a layout.*tp2pp2-packed"):
        named_layout(name, RECIPE, longest_row=30)


def test_the_default_layouts_are_layouts() -> None:
    for name in default_layouts(describe_model(RECIPE.model.path)):
        assert named_layout(name, RECIPE, longest_row=30).ranks <= 4


def write(folder: Path, *, change: float = 0.0) -> Path:
    folder.mkdir()
    scores = torch.arange(6.0).view(2, 3)
    save_file({"log-probabilities/old_logprobs": scores}, folder / "scores.safetensors")
    for name in ("policy", "KL"):
        weights = {f"model.layers.{layer}.weight": torch.ones(4) + layer for layer in range(12)}
        if name == "KL":
            for layer in (2, 10):
                weights[f"model.layers.{layer}.weight"][1] *= 1 + change
        save_file(weights, folder / f"{name}.safetensors")
    return folder


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    """First in the order of the model: layer 2 before layer 10, which sorts before it as text."""
    baseline, same = write(tmp_path / "one"), write(tmp_path / "same")
    wrong = write(tmp_path / "wrong", change=1e-3)
    report = compare([("same", 1, same), ("tp2", 2, wrong)], baseline, subject="test")
    assert report.failures == ["tp2 (2 ranks)"]
    assert "KL gradient first differs in model.layers.2.weight, by 5e-04" in report.checks[1].found
    assert report.checks[1].numbers["policy gradient"] == 0.0


@pytest.mark.parametrize(("change", "holds"), [(BOUND, True), (4 * BOUND, False), (float("nan"), False)])
def test_the_bound_is_on_the_norm_of_a_tensor(tmp_path: Path, change: float, *, holds: bool) -> None:
    """One of four equal entries changed: the tensor changes by half of that. What is not a number never holds."""
    baseline, other = write(tmp_path / "one"), write(tmp_path / "other", change=change)
    assert compare([("other", 1, other)], baseline, subject="test").holds is holds
