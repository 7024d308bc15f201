"""One engine for all tests of this folder: importing vLLM and starting an engine costs 15 CPU seconds."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_klrl.assets import embedded_model
from megatron_klrl.generation.vllm_engine import EngineSettings, VLLMEngine
from megatron_klrl.runtime import world as ranks

SETTINGS = EngineSettings(
    tensor=1,
    dtype=torch.float32,
    max_model_len=224,
    max_num_seqs=64,
    kv_cache_bytes=32 << 20,
    timeout_s=60.0,
    sleeps=False,
)


@pytest.fixture(scope="session")
def folder() -> Path:
    """The shipped model."""
    return embedded_model("arithmetic")


class Host:
    """An engine and what the process looked like before and after it was built."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(7)
        self.before = fingerprint()
        self.group_before = dist.is_initialized()
        self.engine = VLLMEngine(
            folder=folder,
            world=ranks.join(timeout_s=60),
            settings=SETTINGS,
        )
        self.after = fingerprint()


def fingerprint() -> dict[str, Any]:
    """The state of this process that a trainer relies on."""
    import os  # noqa: PLC0415

    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "environment": {
            name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS")
        },
    }


@pytest.fixture(scope="session")
def host(folder: Path) -> Iterator[Host]:
    """The engine's host."""
    built = Host(folder)
    yield built
    built.engine.close()
    # vLLM 0.32 would have destroyed the trainer's default group with the engine
    assert dist.is_initialized(), "closing an engine took the trainer's process group with it"
    ranks.leave()


@pytest.fixture
def engine(host: Host, folder: Path) -> Iterator[VLLMEngine]:
    """The engine with the shipped weights."""
    yield host.engine
    host.engine.update_weights(named_weights(folder), version=0)


def named_weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a folder."""
    from safetensors.torch import load_file  # noqa: PLC0415

    return sorted(load_file(folder / "model.safetensors").items())
