"""The model's tensors under Hugging Face names, streamed to every rank by a plan that is made once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.mcore import conversion
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.runtime.world import World
from megatron_klrl.weight_sync.broadcast import Broadcast
from megatron_klrl.weight_sync.checksum import held_sums, text
from megatron_klrl.weight_sync.choose import Kind, choose, open_transport
from megatron_klrl.weight_sync.in_process import InProcess
from megatron_klrl.weight_sync.transport import Transport, stream

_SHARED = (Kind.SHARED_MEMORY, Kind.CUDA_IPC)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSettings:
    """How weights leave the trainer.

    Attributes:
        kind: of the transport; None takes the quickest one for the layout.
        bucket_bytes: most bytes of whole tensors that travel together.
        folder: of the files of ``disk``.
    """

    kind: Kind | None = None
    bucket_bytes: int = 256 << 20
    folder: Path | None = None


class Streams:
    """Weights through the transport of the run, other values through the process group. Every method is collective."""

    def __init__(
        self,
        chunks: Sequence[Any],
        *,
        shape: ModelShape,
        groups: ProcessGroups,
        world: World,
        settings: SyncSettings,
    ) -> None:
        """Make the plan and open the transport; collective.

        Args:
            chunks: this rank's part of the model, unwrapped.
            shape: of the whole model.
            groups: the layout.
            world: this rank's place.
            settings: how.
        """
        self._chunks, self._groups = chunks, groups
        some = next(chunks[0].parameters())
        ranks = groups.tp.size() * groups.pp.size() * groups.ep.size()
        self.kind = settings.kind or choose(ranks_per_model=ranks, one_machine=world.one_machine, device=some.device)
        self._group = _exchange(self.kind, groups)
        self.plan = conversion.plan(
            shape, groups=groups, exchange=self._group, max_numel=max(1, settings.bucket_bytes // some.element_size())
        )
        self._transport = open_transport(self.kind, self._group, self.plan, dtype=some.dtype, folder=settings.folder)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights. What a tensor's memory is good for, ``Transport.collect`` says."""
        with torch.no_grad():
            yield from stream(self.plan, conversion.parts_by_name(self._chunks, groups=self._groups), self._transport)

    def values(self, value: Callable[[torch.nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Something else of every parameter, of any dtype; may run in step with ``weights``."""
        parts = conversion.parts_by_name(self._chunks, groups=self._groups, value=value)
        transport: Transport = InProcess() if self.kind is Kind.IN_PROCESS else Broadcast(self._group)
        yield from stream(self.plan, parts, transport)

    def checksums(self, chunks: Sequence[Any] | None = None) -> dict[str, str]:
        """Of every tensor, summed over the parts where they lie: no transport has touched what they are made of.

        Args:
            chunks: of another model with the same layout, unwrapped; None: the model that is streamed.
        """
        parts = conversion.parts_by_name(self._chunks if chunks is None else chunks, groups=self._groups)
        sums = held_sums(self.plan, parts, holder=self._group.rank())
        dist.all_reduce(sums, group=self._group)
        names = (tensor.name for bucket in self.plan for tensor in bucket.tensors)
        return {name: text(row) for name, row in zip(names, sums, strict=True)}

    def close(self) -> None:
        """Give the transport's memory back; collective."""
        self._transport.close()


def _exchange(kind: Kind, groups: ProcessGroups) -> dist.ProcessGroup:
    """The smallest group that holds a whole model; where memory is shared, one copy is written for all."""
    if kind in _SHARED or groups.ep.size() > 1:
        world = dist.group.WORLD
        assert world is not None, "Megatron has been initialised"
        return world
    group: Any = parallel_state.get_model_parallel_group()
    return group
