"""Every recipe in examples/ loads; those for CPU are valid as they stand, the others once their model is there."""

from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Dtype
from megatron_klrl.config.validate import validate
from tests.unit.config.folders import make_folder

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "recipes").glob("*.yaml"))
every = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@every
def test_it_is_valid(path: Path, tmp_path: Path) -> None:
    on_cpu = path.stem.endswith("_cpu")
    model = [] if on_cpu else [f"model.path={make_folder(tmp_path / 'model', max_position_embeddings=32768)}"]
    recipe = load_recipe(path, model)
    warned = validate(recipe, 2 if on_cpu else 8)
    allowed = recipe.kl.allow_biased
    assert [text for text in warned if not (allowed and text.startswith("kl.allow_biased"))] == []
    assert recipe.precision.dtype is (Dtype.FP32 if on_cpu else Dtype.BF16)
    assert recipe.generation.sleep is not on_cpu


@every
def test_only_a_cut_ratio_is_a_reason_to_allow_a_bias(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert recipe.kl.allow_biased == (recipe.kl.ratio_max is not None)
