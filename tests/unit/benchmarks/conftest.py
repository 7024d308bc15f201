"""Workloads ask for their rank: one process that is a group of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.harness.ranks import join_ranks


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    if dist.is_initialized():  # by the generation engine that other tests keep for the whole session
        assert dist.get_world_size() == 1
        yield
        return
    with join_ranks(rank=0, ranks=1, meeting=str(tmp_path / "meeting"), device="cpu"):
        yield
