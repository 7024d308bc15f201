"""Which transport a layout takes when nobody says, and how each is opened."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_klrl.weight_sync.broadcast import Broadcast
from megatron_klrl.weight_sync.cuda_ipc import CudaIpc
from megatron_klrl.weight_sync.disk import Disk
from megatron_klrl.weight_sync.in_process import InProcess
from megatron_klrl.weight_sync.plan import Bucket
from megatron_klrl.weight_sync.shared_memory import SharedMemory
from megatron_klrl.weight_sync.transport import Transport


class Kind(StrEnum):
    """How weights move."""

    IN_PROCESS = "in_process"
    SHARED_MEMORY = "shared_memory"
    CUDA_IPC = "cuda_ipc"
    BROADCAST = "broadcast"
    DISK = "disk"


def choose(*, ranks_per_model: int, one_machine: bool, device: torch.device) -> Kind:
    """The quickest transport that works.

    Args:
        ranks_per_model: over which one copy of the model is spread.
        one_machine: all ranks are on it.
        device: of the weights.
    """
    if ranks_per_model == 1:
        return Kind.IN_PROCESS
    if not one_machine:
        return Kind.BROADCAST
    return Kind.CUDA_IPC if device.type == "cuda" else Kind.SHARED_MEMORY


def open_transport(
    kind: Kind, group: dist.ProcessGroup, plan: Sequence[Bucket], *, dtype: torch.dtype, folder: Path | None
) -> Transport:
    """Open a transport for a plan; collective.

    Args:
        kind: of the transport.
        group: that exchanges.
        plan: whose largest bucket says how much memory is held.
        dtype: of the weights.
        folder: of the files, for ``disk``.
    """
    largest = max(bucket.numel for bucket in plan)
    if kind is Kind.IN_PROCESS:
        return InProcess()
    if kind is Kind.SHARED_MEMORY:
        return SharedMemory(group, numel=largest, dtype=dtype)
    if kind is Kind.CUDA_IPC:
        return CudaIpc(group, numel=largest, dtype=dtype)
    if kind is Kind.BROADCAST:
        return Broadcast(group)
    if folder is None:
        raise ValueError("the disk transport needs a folder")
    return Disk(group, inner=Broadcast(group), folder=folder, buckets=len(plan))
