"""What only the update needs, out of device memory while the engine generates.

Megatron-Core has helpers for both parts. Those of its gradient buffers are used here, those of its optimizer are not:
they give every parameter new memory on the way back, and where the model is float32 the optimizer's parameters are
views of the model's, which it would no longer update (megatron-core 0.19.2, ``MegatronOptimizer.restore_from_cpu``).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 28
"""Of host memory that is taken at once. torch rounds pinned memory up to a power of two each time, so taken tensor by
tensor it would be up to twice what they are: for Adam on 8 B parameters some 80 GB too much."""


class HostCopies:
    """Memory of tensors moved to the host and back. Tensors and views stay what they are; their storage is emptied.

    Host memory is kept for the next time: to pin it takes longer than the copies do.
    """

    def __init__(self, *, block_bytes: int = _BLOCK_BYTES) -> None:
        """Hold nothing yet.

        Args:
            block_bytes: of host memory that is taken at once.
        """
        self._block_bytes, self._blocks = block_bytes, list[Tensor]()
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # with their sizes, in the order in which they lie

    @property
    def host_bytes(self) -> int:
        """Memory that is held on the host."""
        return len(self._blocks) * self._block_bytes

    def move_out(self, tensors: Iterable[Tensor]) -> None:
        """Copy every storage to the host once, and free it. Nobody may look at the tensors before ``move_back``."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        pinned = any(storage.device.type == "cuda" for storage in storages.values())
        start = sum(size for _, size in self._away)
        while self.host_bytes < start + sum(storage.nbytes() for storage in storages.values()):
            self._blocks.append(torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=pinned))
        found = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, size in found:
            for host, part in self._pieces(start, _bytes(storage)):
                host.copy_(part, non_blocking=True)
            start += size
        if pinned:
            torch.cuda.synchronize()  # the copies must be there before their sources go
        for storage, _ in found:
            storage.resize_(0)
        self._away += found

    def move_back(self) -> None:
        """Give every storage its memory and its bytes back."""
        start = 0
        for storage, size in self._away:
            storage.resize_(size)
            for host, part in self._pieces(start, _bytes(storage)):
                part.copy_(host, non_blocking=True)
            start += size
        if any(storage.device.type == "cuda" for storage, _ in self._away):
            torch.cuda.synchronize()  # before the host's memory is written again
        self._away = []

    def _pieces(self, start: int, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Host memory from a byte on, block by block, and the part of a tensor that lies there."""
        done = 0
        while done < whole.numel():
            block, offset = divmod(start + done, self._block_bytes)
            size = min(self._block_bytes - offset, whole.numel() - done)
            yield self._blocks[block][offset : offset + size], whole[done : done + size]
            done += size


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


class Offload:
    """Adam's moments and float32 weights, and the gradient buffers, of one rank."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any, *, device: torch.device) -> None:
        """Take what is trained.

        Args:
            chunks: in Megatron's data parallelism.
            optimizer: over all of them.
            device: of both.
        """
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._copies, self._is_out = HostCopies(), False

    def move_out(self) -> None:
        """Optimizer state goes to the host; gradients, of no use after an update, are dropped. Once is enough."""
        if self._is_out:
            return
        on_gpu = self._device.type == "cuda"
        self._copies.move_out(self._state())
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)
        self._is_out = True

    def move_back(self) -> None:
        """Optimizer state as it was, and gradients of zero; nothing where nothing is out."""
        if not self._is_out:
            return
        self._copies.move_back()
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=self._device.type == "cuda")
        self._is_out = False

    def _state(self) -> Iterator[Tensor]:
        """The optimizer's tensors on the device, without those that are views of the model's parameters."""
        of_model = {
            parameter.untyped_storage().data_ptr() for chunk in self._chunks for parameter in chunk.parameters()
        }
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = part.optimizer
            if inner is None:  # a rank whose part of the model has nothing of this kind
                continue
            own = (parameter for group in inner.param_groups for parameter in group["params"])
            values = (value for state in inner.state.values() for value in state.values())
            for tensor in (*own, *values):
                is_ours = isinstance(tensor, Tensor) and tensor.device.type == self._device.type and tensor.numel() > 0
                if is_ours and tensor.untyped_storage().data_ptr() not in of_model:
                    yield tensor.detach()
