"""The shipped model folder, loaded once."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_klrl.assets import embedded_model


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return embedded_model("arithmetic")


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
