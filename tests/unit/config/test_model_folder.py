import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_klrl.assets import embedded_model
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.rope import Rope, RopeKind
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_folder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        describe_model(path)
    return str(caught.value)


def test_embedded_model_has_as_many_parameters_as_its_file() -> None:
    shape = describe_model("embedded:arithmetic")
    with (embedded_model("arithmetic") / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    sizes = []
    for tensor in header.values():
        size = 1
        for dimension in tensor["shape"]:
            size *= dimension
        sizes.append(size)
    assert shape.parameters == sum(sizes)
    assert (shape.heads, shape.kv_heads, shape.layers) == (2, 2, 4)


def test_unknown_embedded_model_names_the_known_ones() -> None:
    text = message("embedded:algebra")
    assert text.startswith("model.path: ")
    assert "embedded:arithmetic" in text


def test_parameters_by_hand_with_bias_and_untied(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "m",
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=None,
        intermediate_size=10,
        vocab_size=5,
        tie_word_embeddings=False,
    )
    shape = describe_model(folder)
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + (8 + 4 + 4)
    assert shape.parameters == attention + 2 * 8 + 3 * 8 * 10 + 2 * 5 * 8 + 8
    assert shape.head_dim == 4
    assert shape.attention_bias
    assert not shape.qk_norm


def test_old_and_new_spelling_of_rope_mean_the_same(tmp_path: Path) -> None:
    new = make_folder(tmp_path / "new", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    old = make_folder(tmp_path / "old", rope_parameters=None, rope_theta=500000.0, rope_scaling=LLAMA3)
    older = {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"}
    oldest = make_folder(tmp_path / "oldest", rope_parameters=None, rope_theta=500000.0, rope_scaling=older)
    expected = Rope(theta=500000.0, kind=RopeKind.LLAMA3, factor=32.0)
    assert [describe_model(folder).rope for folder in (new, old, oldest)] == [expected] * 3


def test_rope_without_settings_is_the_default(tmp_path: Path) -> None:
    assert describe_model(make_folder(tmp_path / "m", rope_parameters=None)).rope == Rope(theta=10000.0)


def test_qwen3_without_head_dim_takes_the_familys_default(tmp_path: Path) -> None:
    assert describe_model(make_folder(tmp_path / "m", head_dim=None)).head_dim == 128


def test_llama_without_kv_heads_has_one_per_head(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", architectures=["LlamaForCausalLM"], num_key_value_heads=None)
    assert describe_model(folder).kv_heads == 4


def test_generation_config_decides_the_end_of_sequence(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    assert describe_model(folder).eos_ids == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert describe_model(folder).eos_ids == (7, 8)


def test_sharded_weights_are_accepted_when_all_are_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", without=("model.safetensors",))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (folder / "1.safetensors").touch()
    assert "lacks 2.safetensors" in message(folder)
    (folder / "2.safetensors").touch()
    assert describe_model(folder).layers == 4


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_names_folder_and_fix(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m", without=(name,))
    text = message(folder)
    assert text.startswith(f"model.path: {folder} has no {name}")
    assert "Fix: " in text


def test_no_folder_and_a_file(tmp_path: Path) -> None:
    assert "there is no folder" in message(tmp_path / "nope")
    file = tmp_path / "model.safetensors"
    file.touch()
    assert f"give its folder {tmp_path}" in message(file)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: is not" in message(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "this version trains Qwen2ForCausalLM"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive whole number"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor of the llama3 rope is 2.0, only 1"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor"),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}}, "only 8192 is supported"),
        ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"eos_token_id": None}, "names no end-of-sequence token"),
        ({"architectures": ["LlamaForCausalLM"], "head_dim": None, "hidden_size": 66}, "not a multiple"),
    ],
)
def test_models_that_cannot_be_trained(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    folder = make_folder(tmp_path / "m", **changes)
    text = message(folder)
    assert expected in text
    assert str(folder) in text
    assert "Fix: " in text
