"""Small random Hugging Face models of each supported family, on disk."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2_tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    # 51 is not a multiple of 2: with TP 2 the vocabulary is padded
    "qwen2_untied": Qwen2Config(**{**SMALL, "vocab_size": 51}, tie_word_embeddings=False),
    "qwen3_tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama31_untied": LlamaConfig(**SMALL, tie_word_embeddings=False, rope_parameters=LLAMA31_ROPE),
}
MIXTURE = Qwen3MoeConfig(
    **SMALL,
    head_dim=16,
    tie_word_embeddings=False,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)
"""A small mixture of experts, apart from the dense families: it takes longer."""


def write_model(folder: Path, config: PretrainedConfig, *, seed: int = 0) -> Path:
    """Write a model with random weights large enough that every part matters; a tokenizer file is faked by its name."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def token_logprobs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' log-probabilities of ``tokens[:, 1:]``: the independent oracle."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
