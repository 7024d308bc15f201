"""Every recipe in examples/ loads; those for CPU are valid as they stand, the others once their model is there."""

from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Dtype, Recipe
from megatron_klrl.config.study import load_study
from megatron_klrl.config.validate import validate
from megatron_klrl.study.plan import plan_runs
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


STUDIES = sorted(path for path in RECIPES[0].parents[1].glob("studies/*.yaml") if not path.stem.startswith("base_"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_valid_at_every_point(path: Path, tmp_path: Path) -> None:
    on_cpu = path.stem.endswith("_cpu")
    study = load_study(path)
    if not on_cpu:
        model = make_folder(tmp_path / "model", max_position_embeddings=32768)
        study = study.model_copy(update={"overrides": (*study.overrides, f"model.path={model}")})

    def check(recipe: Recipe) -> int:
        ranks = 1 if on_cpu else 8
        warned = validate(recipe, ranks)
        assert [text for text in warned if not text.startswith("kl.allow_biased")] == []
        assert recipe.has_reference, "the distance is measured in every cell"
        return ranks

    runs = plan_runs(study, path, check=check)
    assert len({run.name for run in runs}) == len(runs)
    assert "Never run" in path.read_text() or on_cpu
    assert f"klrl study examples/studies/{path.name}" in path.read_text()
