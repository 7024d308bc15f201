"""This project: the plan of blocks and its transports, into an engine's tensors."""

from collections.abc import Callable

import torch.distributed as dist

from benchmarks.harness.parity import Answer
from benchmarks.workloads.reshard import Reshard
from megatron_klrl.mcore import conversion
from megatron_klrl.weight_sync.choose import Kind, open_transport
from megatron_klrl.weight_sync.plan import Bucket
from megatron_klrl.weight_sync.transport import Transport, stream

Step = Callable[[], Answer]
_BUCKET_BYTES = 256 << 20  # the recipe's default


def refit(work: Reshard, *, kind: str, planned: bool = True, bucket_bytes: int = _BUCKET_BYTES) -> Step:
    """A refit by a plan made before, or made anew in each call with the transport's memory."""
    group = dist.group.WORLD
    assert group is not None  # the harness has joined the ranks
    wanted = Kind(kind)

    def prepare() -> tuple[tuple[Bucket, ...], Transport]:
        plan = conversion.plan(
            work.shape, groups=work.groups, exchange=group, max_numel=bucket_bytes // work.dtype.itemsize
        )
        return plan, open_transport(wanted, group, plan, dtype=work.dtype, folder=None)

    kept = prepare() if planned else None

    def step() -> Answer:
        plan, transport = kept or prepare()
        for name, tensor in stream(plan, work.parts, transport):
            work.targets[name].copy_(tensor)
        if kept is None:
            transport.close()
        return work.answer()

    return step
