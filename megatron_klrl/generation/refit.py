"""Checks of the weights that arrive in an engine: names, shapes, number format, values, and checksums of the bits."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_klrl.errors import DivergenceError, WorkError
from megatron_klrl.weight_sync.checksum import checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitReport:
    """One complete weight update.

    Attributes:
        version: of the weights.
        tensors: how many arrived.
        bytes: how many they took.
        checksums: by tensor, of its bits as they arrived; None where not asked for.
    """

    version: int
    tensors: int
    bytes: int
    checksums: Mapping[str, str] | None


class Intake:
    """Passes the tensors of one update on, refusing what vLLM would swallow.

    A missing part of a fused weight leaves uninitialised memory in the engine, values that are not finite outlive the
    weights in its cache, and another number format is rounded: all without an error.
    """

    def __init__(
        self, expected: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, takes_checksums: bool = False
    ) -> None:
        """Take what must arrive: shapes by name, all in one number format."""
        self._expected, self._dtype = expected, dtype
        self._missing = dict(expected)
        self._checksums: dict[str, str] | None = {} if takes_checksums else None
        self._bytes = 0

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each checked before it goes on.

        Raises:
            WorkError: a tensor is missing, unknown, repeated, of another shape or format, or not finite.
        """
        for name, tensor in weights:
            self._check_one(name, tensor)
            self._bytes += tensor.numel() * tensor.element_size()
            if self._checksums is not None:
                self._checksums[name] = checksum(tensor)
            yield name, tensor
        if self._missing:
            raise WorkError(f"weight update lacks {len(self._missing)} tensors, {next(iter(self._missing))} first")

    def _check_one(self, name: str, tensor: Tensor) -> None:
        size = self._missing.pop(name, None)
        if size is None:
            known = "twice" if name in self._expected else "but the engine's model has no such tensor"
            raise WorkError(f"weight update brings {name} {known}")
        if tuple(tensor.shape) != size:
            raise WorkError(f"weight update brings {name} as {tuple(tensor.shape)}, the engine's is {size}")
        if tensor.dtype != self._dtype:
            formats = f"as {_plain(tensor.dtype)}, the engine computes in {_plain(self._dtype)}"
            raise WorkError(f"weight update brings {name} {formats}")
        if not bool(torch.isfinite(tensor).all()):
            raise DivergenceError(f"weight update brings {name} with values that are not finite")

    def report(self, *, version: int) -> RefitReport:
        """What arrived, once all of it has."""
        return RefitReport(version=version, tensors=len(self._expected), bytes=self._bytes, checksums=self._checksums)


def tensor_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face folder."""
    sizes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            sizes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118  no mapping
    return sizes


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
