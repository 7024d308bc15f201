from pathlib import Path
from typing import Any

import pytest

from megatron_klrl.assets import embedded_model
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.errors import UserError
from megatron_klrl.planning.model import read_model
from tests.unit.config.folders import make_folder
from tests.unit.planning.configs import DEEPSEEK_V3, QWEN3_235B, QWEN25_7B, write


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        # as their makers count them: 7.61 B; 235 B, 22 B of them with the embedding; 671 B, 37 B of them likewise
        (QWEN25_7B, 7.616, 7.071),
        (QWEN3_235B, 235.09, 21.57),
        (DEEPSEEK_V3, 671.03, 36.63),
    ],
)
def test_parameters_of_published_models(tmp_path: Path, config: dict[str, Any], billions: float, active: float) -> None:
    model = read_model(str(write(tmp_path / "m", config)))
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.active_parameters / 1e9 == pytest.approx(active, abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False, "head_dim": None},
        {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": None},
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
    ],
)
def test_the_plan_counts_what_the_trainer_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "m", **changes)
    shape, model = describe_model(folder), read_model(str(folder))
    assert model.parameters == shape.parameters
    assert model.expert_parameters == shape.expert_parameters
    assert model.trainable


def test_latent_attention_caches_what_all_heads_share(tmp_path: Path) -> None:
    model = read_model(str(write(tmp_path / "m", DEEPSEEK_V3) / "config.json"))
    assert not model.trainable
    assert model.cached_numbers(tensor=1) == model.cached_numbers(tensor=8) == 61 * 576


def test_grouped_attention_caches_its_share_and_at_least_one_head(tmp_path: Path) -> None:
    model = read_model(str(write(tmp_path / "m", QWEN25_7B)))
    assert model.cached_numbers(tensor=1) == 28 * 2 * 4 * 128
    assert model.cached_numbers(tensor=4) == model.cached_numbers(tensor=28) == 28 * 2 * 128


def test_tensor_ranks_hold_a_share_and_what_is_not_cut(tmp_path: Path) -> None:
    model = read_model(str(write(tmp_path / "m", QWEN25_7B)))
    norms = 2 * 3584
    assert model.dense_part(0, tensor=4) - norms == -(-(model.dense_part(0) - norms) // 4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "plans are made for Qwen2ForCausalLM"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_model(str(write(tmp_path / "m", QWEN25_7B | changes)))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config.json at"):
        read_model(str(tmp_path / "nowhere"))
    assert read_model("embedded:arithmetic").name == embedded_model("arithmetic").name
