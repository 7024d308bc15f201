"""Through a process group: gloo or NCCL, within a node or between nodes."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.weight_sync.plan import Bucket, Share


class Broadcast:
    """Each holder packs its blocks of a bucket into one message to the group.

    Memory beside the weights: one bucket of whole tensors and one of messages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Take the group; its rank numbers are the plan's holders."""
        self._group = group

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Transport.collect``."""
        some = next(iter(parts.values()))
        whole = bucket.views(some.new_empty(bucket.numel))
        messages = [(holder, bucket.shares_of(holder)) for holder in bucket.holders]
        sent = [(shares, *self._send(holder, shares, parts, like=some)) for holder, shares in messages]
        for shares, message, work in sent:
            work.wait()
            for (number, share), block in zip(shares, _unpacked(message, shares), strict=True):
                share.block.of_whole(whole[number][1]).copy_(block)
        return whole

    def close(self) -> None:
        """Nothing is held between buckets."""

    def _send(
        self, holder: int, shares: Sequence[tuple[int, Share]], parts: Mapping[str, Tensor], *, like: Tensor
    ) -> tuple[Tensor, dist.Work]:
        message = like.new_empty(sum(share.block.numel for _, share in shares))
        if self._group.rank() == holder:
            for (_, share), block in zip(shares, _unpacked(message, shares), strict=True):
                block.copy_(share.block.of_part(parts[share.part]))
        work = dist.broadcast(message, src=dist.get_global_rank(self._group, holder), group=self._group, async_op=True)
        assert work is not None, "async_op gives a handle to every member of the group"
        return message, work


def _unpacked(message: Tensor, shares: Sequence[tuple[int, Share]]) -> list[Tensor]:
    blocks = message.split([share.block.numel for _, share in shares])
    sizes = [torch.Size(end - start for start, end in share.block.box) for _, share in shares]
    return [block.view(size) for block, size in zip(blocks, sizes, strict=True)]
