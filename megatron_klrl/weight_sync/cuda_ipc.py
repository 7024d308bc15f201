"""Through device memory that the ranks of one machine open to each other: two handles a rank, opened once."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_klrl.weight_sync.plan import Bucket


class CudaIpc:
    """Every rank holds two buckets on its own device; each holder writes its blocks into all of them.

    One handle per bucket, not per tensor: opening a handle costs more than copying a small tensor. Writes to other
    devices go over NVLink where there is one; ranks that share a device share its memory.
    """

    def __init__(self, group: dist.ProcessGroup, *, numel: int, dtype: torch.dtype) -> None:
        """Allocate and exchange handles; collective.

        Args:
            group: ranks of this machine that together hold the model; its rank numbers are the plan's holders.
            numel: of the largest bucket.
            dtype: of the weights.
        """
        self._group, self._turn = group, 0
        own = [torch.empty(numel, dtype=dtype, device="cuda") for _ in range(2)]
        handles: list[Any] = [None] * group.size()
        dist.all_gather_object(handles, [reduce_tensor(memory) for memory in own], group=group)
        # [turn][rank]: a rank's own memory is not opened a second time
        self._memory: list[list[Tensor]] = [
            [own[turn] if rank == group.rank() else _opened(handles[rank][turn]) for rank in range(group.size())]
            for turn in range(2)
        ]

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Transport.collect``."""
        everywhere = [bucket.views(memory[: bucket.numel]) for memory in self._memory[self._turn]]
        self._turn = 1 - self._turn
        for number, share in bucket.shares_of(self._group.rank()):
            block = share.block.of_part(parts[share.part])
            for whole in everywhere:
                share.block.of_whole(whole[number][1]).copy_(block, non_blocking=True)
        # other ranks read what this one's stream writes: it must be done before they are told so
        torch.cuda.synchronize()
        dist.barrier(self._group)
        return everywhere[self._group.rank()]

    def close(self) -> None:
        """Close the handles, then free the memory; collective, since nobody may free what another still maps."""
        torch.cuda.synchronize()
        own = [memory[self._group.rank()] for memory in self._memory]
        self._memory = []
        dist.barrier(self._group)
        del own


def _opened(handle: Any) -> Tensor:
    rebuild, arguments = handle
    opened: Tensor = rebuild(*arguments)
    return opened
