"""Rules about sampling: what is refused, what consent it takes, and what the run then says of itself."""

from pathlib import Path

import pytest

from megatron_klrl.config.describe import kl_verdict
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import check_memory, validate
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_folder, make_recipe


def load(tmp_path: Path, *overrides: str) -> Recipe:
    folder = make_folder(tmp_path / "model")
    return load_recipe(make_recipe(tmp_path), [f"model.path={folder}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        (["generation.top_p=0.9"], "generation.top_p", "rollouts with top_p 0.9 come from a truncated distribution"),
        (["generation.top_k=50"], "generation.top_k", "rollouts with top_k 50 come"),
        (["generation.top_k=50", "kl.beta=0"], "generation.top_k", "or kl.allow_biased=true"),
        (["generation.temperature=0.001"], "generation.temperature", "vLLM samples at 0.01 at the lowest"),
        (["data.eval.id.temperature=0.001"], "data.eval.id.temperature", "set it to 0.01 or more"),
    ],
)
def test_sampling_that_is_not_the_policys_is_refused(
    tmp_path: Path, overrides: list[str], field: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(load(tmp_path, *overrides), 1)
    assert caught.value.field == field
    assert expected in str(caught.value)


def test_greedy_evaluation_is_no_low_temperature(tmp_path: Path) -> None:
    assert validate(load(tmp_path, "data.eval.id.temperature=0", "data.eval.id.samples=1"), 1) == []


def test_with_consent_the_run_says_what_it_samples_from(tmp_path: Path) -> None:
    recipe = load(tmp_path, "generation.top_p=0.9", "generation.top_k=50", "kl.allow_biased=true")
    (warning,) = validate(recipe, 1)
    assert warning.startswith("kl.allow_biased: rollouts with top_p 0.9 and top_k 50 come from a truncated")
    assert kl_verdict(recipe).startswith("biased, and kl.allow_biased lets it run: rollouts with top_p 0.9 and top_k")
    assert kl_verdict(load(tmp_path)).startswith("follows the gradient")


def test_memory_is_given_back_on_gpus_alone(tmp_path: Path) -> None:
    recipe = load(tmp_path, "generation.sleep=true")
    check_memory(recipe, gpus=1)
    with pytest.raises(UserError, match=r"generation.sleep: is true, but there is no GPU.*set generation.sleep=false"):
        check_memory(recipe, gpus=0)
    recipe = load(tmp_path, "memory.offload_while_generating=true")
    check_memory(recipe, gpus=1)
    with pytest.raises(UserError, match=r"memory.offload_while_generating: is true, but there is no GPU.*=false"):
        check_memory(recipe, gpus=0)
    check_memory(load(tmp_path), gpus=0)
