from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.precision import (
    Capability,
    alignment,
    available,
    check_fp8_settings,
    check_precision,
    check_quantised_engine,
    fp8_refusal,
    warn_precision,
)
from megatron_klrl.config.recipe import Fp8, Recipe
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_folder, make_recipe

AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(make_recipe(tmp_path), ["precision.dtype=bf16", *overrides])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (AMPERE, ()),
        ((8, 6), ()),
        (ADA, ("tensorwise", "delayed")),
        (HOPPER, ("tensorwise", "delayed", "blockwise")),
        (BLACKWELL, ("tensorwise", "delayed", "blockwise", "mxfp8")),
        (CONSUMER, ("tensorwise", "delayed")),
    ],
)
def test_formats_of_each_generation(capability: Capability, expected: tuple[str, ...]) -> None:
    assert tuple(map(str, available(capability))) == expected
    for fp8 in Fp8:
        refused = fp8_refusal(fp8, [capability])
        assert (refused is None) == (fp8 is Fp8.NONE or fp8 in expected)


def test_the_weakest_gpu_decides_and_a_cpu_has_none() -> None:
    assert fp8_refusal(Fp8.TENSORWISE, [HOPPER, AMPERE]) == (
        "is tensorwise, but a GPU of compute capability 8.0 has no 8-bit format"
    )
    assert fp8_refusal(Fp8.MXFP8, [HOPPER]) == (
        "is mxfp8, but a GPU of compute capability 9.0 has tensorwise, delayed, blockwise"
    )
    assert "there is no GPU" in str(fp8_refusal(Fp8.TENSORWISE, []))
    assert fp8_refusal(Fp8.NONE, []) is None


def test_the_fix_is_what_the_gpu_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"precision.fp8: .* Fix: set precision.fp8=none or precision.fp8=tensorwise"):
        check_precision(recipe(tmp_path, "precision.fp8=mxfp8"), [HOPPER])
    with pytest.raises(UserError, match=r"generation.quantization: is fp8, but there is no GPU"):
        check_precision(recipe(tmp_path, "generation.quantization=fp8"), [])
    with pytest.raises(UserError, match=r"generation.quantization: is fp8, but the GPU has no 8-bit products"):
        check_precision(recipe(tmp_path, "generation.quantization=fp8"), [AMPERE])
    check_precision(recipe(tmp_path, "precision.fp8=blockwise", "generation.quantization=fp8"), [HOPPER])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["precision.fp8=tensorwise", "precision.dtype=fp32"], "precision.dtype: is fp32"),
        (["precision.first_last_bf16=true"], "precision.first_last_bf16: is true, but precision.fp8 is none"),
        (["precision.fp8=delayed", "precision.first_last_bf16=true"], "precision.first_last_bf16: .* delayed scaling"),
        (["precision.fp8_primary_weights=true"], "precision.fp8_primary_weights: is true, but precision.fp8 is none"),
        (
            ["precision.fp8=delayed", "precision.fp8_primary_weights=true"],
            "precision.fp8_primary_weights: .*delayed a weight has no scale before the first update",
        ),
        (
            ["precision.fp8=mxfp8", "precision.fp8_primary_weights=true"],
            "precision.fp8_primary_weights: .*mxfp8 the optimizer would have to gather",
        ),
        (["precision.fp8=blockwise"], "multiples of 128, but the hidden size are 64. Fix: set precision.fp8=none or "),
        (
            ["precision.fp8=mxfp8", "parallel.tensor=4"],
            "multiples of 32, but the feed-forward columns of a rank are 48",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: list[str], problem: str) -> None:
    shape = describe_model(make_folder(tmp_path / "m", num_key_value_heads=4))
    with pytest.raises(UserError, match=problem):
        check_fp8_settings(recipe(tmp_path, *overrides), shape)


def test_settings_that_go_together(tmp_path: Path) -> None:
    shape = describe_model(make_folder(tmp_path / "m"))
    check_fp8_settings(recipe(tmp_path, "precision.fp8=tensorwise", "precision.first_last_bf16=true"), shape)
    check_fp8_settings(recipe(tmp_path, "precision.fp8=tensorwise", "precision.fp8_primary_weights=true"), shape)
    check_fp8_settings(recipe(tmp_path), shape)


def test_samples_of_a_rounded_model_are_corrected_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation.quantization: is fp8: rollouts come from the rounded model"):
        check_quantised_engine(recipe(tmp_path, "generation.quantization=fp8"))
    for taken in (
        ["mismatch.correction=token_truncate"],
        ["algorithm.surrogate=ppo_clip", "algorithm.ratio_to=rollout"],
        ["kl.allow_biased=true"],
    ):
        check_quantised_engine(recipe(tmp_path, "generation.quantization=fp8", *taken))


def test_warnings(tmp_path: Path) -> None:
    assert not list(warn_precision(recipe(tmp_path)))
    assert len(list(warn_precision(recipe(tmp_path, "precision.fp8=tensorwise")))) == 1
    assert "delayed scaling" in next(warn_precision(recipe(tmp_path, "precision.fp8=delayed")))


def test_alignments_are_whole_multiples_of_sixteen() -> None:
    assert {str(fp8): alignment(fp8) for fp8 in Fp8} == {
        "none": 1, "tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32,
    }  # fmt: skip
