"""Model folders and recipes made on the spot: real files, no weights worth reading."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

RECIPE = """
model: {path: embedded:arithmetic}
precision: {dtype: fp32}
optimizer: {lr: 1e-3}
generation: {max_tokens: 24}
loop: {steps: 2, prompts_per_step: 2, group_size: 2}
data:
  train: {task: arithmetic, kind: chain, terms: [3, 4]}
  eval:
    id: {task: arithmetic, kind: chain, terms: [3, 4], prompts: 4}
"""


def make_folder(folder: Path, *, without: tuple[str, ...] = (), **changes: object) -> Path:
    """A folder that passes for a model; a change to None removes the key, a file in `without` is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    files = {"config.json": json.dumps(config), "model.safetensors": "", "tokenizer.json": "{}"}
    for name, text in files.items():
        if name not in without:
            (folder / name).write_text(text)
    return folder


def make_recipe(folder: Path, text: str = RECIPE, name: str = "tiny.yaml") -> Path:
    """A recipe file."""
    file = folder / name
    file.write_text(text)
    return file
