"""The one reader of the launcher's environment and the one owner of the default process group."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_klrl.errors import UserError

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One rank's place in the job.

    Attributes:
        rank: global rank, 0 based.
        size: number of ranks.
        local_rank: rank on this machine; the CUDA device index where there is CUDA.
        device: where parameters live.
        one_machine: all ranks of the job are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    one_machine: bool

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def under_launcher() -> bool:
    """Whether torchrun, srun torchrun or our own launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(*, timeout_s: float) -> World:
    """Join the job's default process group: NCCL (with gloo for CPU tensors) on CUDA, gloo elsewhere.

    Without a launcher the world is this one process.

    Args:
        timeout_s: bound on any collective, in seconds.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    if under_launcher():
        missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"started as a rank, but {', '.join(missing)} is not set",
                field="environment",
                fix="start with `klrl train`, torchrun or `srun torchrun`",
            )
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        init: dict[str, Any] = {}
    else:
        rank, size, local_rank = 0, 1, 0
        init = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device = _device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **init)
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == size or size == 1
    return World(rank=rank, size=size, local_rank=local_rank, device=device, one_machine=one_machine)


def leave() -> None:
    """Destroy the default process group, if there still is one (an engine may have destroyed it)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} but only {torch.cuda.device_count()} CUDA devices are visible",
            field="launch.ranks",
            fix="start at most one rank per visible device (CUDA_VISIBLE_DEVICES)",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
