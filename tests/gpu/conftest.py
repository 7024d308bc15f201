"""What only a CUDA device can show: ``pytest -m gpu tests/gpu``. Each test runs in ranks of its own.

Written without a device at hand. docs/status.md says what has run.
"""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from tests.support.models import write_model

HERE = Path(__file__).parent
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,  # every size is a multiple of 128, as blockwise scaling asks
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them where there is no device."""
    missing = None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing is not None:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return write_model(tmp_path_factory.mktemp("dense"), Qwen3Config(**_SIZES, tie_word_embeddings=True))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 with experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    return write_model(tmp_path_factory.mktemp("mixture"), Qwen3MoeConfig(**_SIZES, **experts))
