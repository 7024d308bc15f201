"""Bounds of surrogates and mismatch corrections: their defaults, and the refusal of what would be read and ignored."""

from pathlib import Path

import pytest

from megatron_klrl.config.algorithm import AlgorithmSection, MismatchSection
from megatron_klrl.config.bounds import CLIPS, WEIGHT_RANGES, clip_bounds, weight_range
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import validate
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_recipe


def load(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(make_recipe(tmp_path), overrides)


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ([], {}),
        (["surrogate=ppo_clip"], {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}),
        (
            ["surrogate=ppo_clip", "clip_high=0.28", "dual_clip=3"],
            {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
        ),
        (["surrogate=gspo"], {"clip_low": 3e-4, "clip_high": 4e-4}),
        (["surrogate=cispo"], {"clip_low": 1.0, "clip_high": 4.0}),
        (["surrogate=cispo", "clip_low=0.5"], {"clip_low": 0.5, "clip_high": 4.0}),
    ],
)
def test_every_surrogate_has_its_own_clip(tmp_path: Path, overrides: list[str], bounds: dict) -> None:
    recipe = load(tmp_path, *(f"algorithm.{override}" for override in overrides))
    assert validate(recipe, 1) == []
    assert clip_bounds(recipe.algorithm) == bounds


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ([], {}),
        (["correction=token_truncate"], {"high": 2.0}),
        (["correction=token_mask"], {"low": 0.5, "high": 5.0}),
        (["correction=token_mask", "low=0"], {"low": 0.0, "high": 5.0}),
        (["correction=sequence_truncate", "high=3"], {"high": 3.0}),
        (["correction=sequence_mask"], {"low": 0.0, "high": 2.0}),
    ],
)
def test_every_correction_has_its_own_range(tmp_path: Path, overrides: list[str], bounds: dict) -> None:
    recipe = load(tmp_path, *(f"mismatch.{override}" for override in overrides))
    assert validate(recipe, 1) == []
    assert weight_range(recipe.mismatch) == bounds


@pytest.mark.parametrize(
    ("overrides", "field", "problem", "fix"),
    [
        (["algorithm.clip_low=0.1"], "algorithm.clip_low", "is 0.1, but surrogate reinforce has no such bound",
         "set algorithm.clip_low=null, or algorithm.surrogate to ppo_clip or gspo or cispo"),
        (["algorithm.clip_high=0.1"], "algorithm.clip_high", "is 0.1, but surrogate reinforce has no such bound",
         "set algorithm.clip_high=null, or algorithm.surrogate to ppo_clip or gspo or cispo"),
        (["algorithm.surrogate=gspo", "algorithm.dual_clip=3"], "algorithm.dual_clip",
         "is 3, but surrogate gspo has no such bound",
         "set algorithm.dual_clip=null, or algorithm.surrogate to ppo_clip"),
        (["algorithm.norm_length=8"], "algorithm.norm_length", "is 8, but aggregation sequence_sum has no divisor",
         "set algorithm.norm_length=null, or algorithm.aggregation=constant_norm"),
        (["mismatch.high=3"], "mismatch.high", "is 3, but correction none has no such bound",
         "or mismatch.correction to token_truncate or token_mask or prefix_truncate or sequence_truncate"),
        (["mismatch.correction=token_truncate", "mismatch.low=0.5"], "mismatch.low",
         "is 0.5, but correction token_truncate has no such bound",
         "set mismatch.low=null, or mismatch.correction to token_mask or sequence_mask"),
        (["mismatch.correction=token_mask", "mismatch.low=6"], "mismatch.low", "the range [6, 5] keeps nothing",
         "set mismatch.low below 5, or mismatch.high above 6"),
        (["mismatch.correction=token_mask", "mismatch.high=0.5"], "mismatch.high", "the range [0.5, 0.5] keeps nothing",
         "set mismatch.low below 0.5, or mismatch.high above 0.5"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, overrides: list[str], field: str, problem: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(load(tmp_path, *overrides), 1)
    assert caught.value.field == field
    assert problem in str(caught.value)
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("algorithm.clip_low=0", "algorithm.clip_low"),
        ("algorithm.clip_low=1.5", "algorithm.clip_low"),
        ("algorithm.clip_high=-0.1", "algorithm.clip_high"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip"),
        ("algorithm.entropy_bonus=-0.1", "algorithm.entropy_bonus"),
        ("algorithm.norm_length=0", "algorithm.norm_length"),
        ("mismatch.low=-1", "mismatch.low"),
        ("mismatch.high=0", "mismatch.high"),
        ("mismatch.correction=tis", "mismatch.correction"),
    ],
)
def test_numbers_without_meaning_are_refused_where_they_are_read(tmp_path: Path, override: str, field: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, override)
    assert caught.value.field == field


def test_the_recipe_states_every_default_in_its_own_words() -> None:
    """The numbers of the tables stand in the description of the key that they are the default of."""
    for section, tables in ((AlgorithmSection, CLIPS), (MismatchSection, WEIGHT_RANGES)):
        for choice, bounds in tables.items():
            for name, default in bounds.items():
                text = section.model_fields[name].description or ""
                stated = "no bound" if default is None else f"{default:.4f}".rstrip("0").rstrip(".")
                assert stated in text, (choice, name)
