"""Joins the processes of one contestant; Megatron-Core asks for a group even where there is one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def join_ranks(*, rank: int, ranks: int, meeting: str, device: str) -> Iterator[None]:
    """The default process group exists inside.

    Args:
        rank: of this process.
        ranks: number of processes.
        meeting: a file that the ranks share.
        device: ``cuda`` takes NCCL for tensors there.
    """
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
