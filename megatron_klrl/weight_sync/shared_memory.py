"""Through memory that the ranks of one machine share: each writes its blocks where they belong, all read."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.errors import WorkError
from megatron_klrl.weight_sync.plan import Bucket

_FOLDER = Path("/dev/shm")


class SharedMemory:
    """Two buckets of shared memory, taken in turn, so that one is written while the other is still read.

    A rank comes to the next bucket only when its engine is done with the one before. After the barrier of a bucket
    nobody reads the bucket before it any more, and its memory is free for the next.
    """

    def __init__(self, group: dist.ProcessGroup, *, numel: int, dtype: torch.dtype) -> None:
        """Map the memory; collective.

        Args:
            group: ranks of this machine that together hold the model; its rank numbers are the plan's holders.
            numel: of the largest bucket.
            dtype: of the weights.

        Raises:
            WorkError: the machine has too little shared memory.
        """
        self._group, self._turn = group, 0
        self._memory: list[Tensor] = [_mapped(group, numel, dtype) for _ in range(2)]

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Transport.collect``."""
        whole = bucket.views(self._memory[self._turn][: bucket.numel])
        self._turn = 1 - self._turn
        for number, share in bucket.shares_of(self._group.rank()):
            share.block.of_whole(whole[number][1]).copy_(share.block.of_part(parts[share.part]))
        dist.barrier(self._group)
        return whole

    def close(self) -> None:
        """Unmap; the last rank to do so frees the memory."""
        self._memory = []


def _mapped(group: dist.ProcessGroup, numel: int, dtype: torch.dtype) -> Tensor:
    """One piece of memory in every rank. Its name is gone before anybody can leave it behind."""
    first = dist.get_global_rank(group, 0)
    named: list[Any] = [None]
    if group.rank() == 0:
        named = [_file(numel * dtype.itemsize)]
    dist.broadcast_object_list(named, src=first, group=group)
    name, problem = named[0]
    if problem:
        raise WorkError(problem)
    memory = torch.from_file(name, shared=True, size=numel, dtype=dtype)
    dist.barrier(group)
    if group.rank() == 0:
        os.unlink(name)
    return memory


def _file(size: int) -> tuple[str, str]:
    """A file of shared memory and no problem, or no file and the problem: all ranks must hear of it."""
    free = shutil.disk_usage(_FOLDER).free
    if free < size:
        wanted = f"{_FOLDER} has {free >> 20} MiB free, a bucket of weights takes {size >> 20} MiB (two are needed)"
        return "", f"{wanted}: set weight_sync.bucket_mib lower, or weight_sync.transport=broadcast"
    handle, name = tempfile.mkstemp(prefix="klrl-weights-", dir=_FOLDER)
    os.truncate(handle, size)
    os.close(handle)
    return name, ""
