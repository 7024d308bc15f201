"""Tensors of a device that this machine has not: they compute on the CPU, and refuse to meet tensors that are there.

What only a GPU would show of code without kernels of its own: a constant, an index or a mask that was made on the CPU.
The device goes by the name ``meta``, for torch asks no driver about that one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
_MAY_MIX = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
"""As on CUDA: copies between devices, and an index on the CPU."""


class Away(torch.Tensor):
    """A tensor there; ``held`` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Away":
        """Of a tensor that is here, whose memory it shares."""
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Away = torch.Tensor._make_wrapper_subclass(cls, held.shape, **shape, device=AWAY)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})

    def cpu(self) -> Tensor:
        """The numbers."""
        return self.held

    def item(self) -> Any:
        """The number."""
        return self.held.item()

    def tolist(self) -> Any:
        """The numbers."""
        return self.held.tolist()

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Away({self.held!r})"


@contextmanager
def elsewhere() -> Iterator[Callable[[Tensor], Tensor]]:
    """Sends tensors away; in the body tensors that are made for the device of one of them are there too."""
    with _FromNumbers(), _MadeThere():
        yield Away


def sent(batch: Any, away: Callable[[Tensor], Tensor]) -> Any:
    """A batch with every tensor there."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: away(tensor) for name, tensor in tensors.items() if tensor is not None})


class _FromNumbers(TorchFunctionMode):
    """``torch.tensor`` makes a tensor for the device at once, which would have no numbers."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        wanted = (kwargs or {}).get("device")
        if function is torch.tensor and wanted is not None and torch.device(wanted) == AWAY:
            return Away(function(*args, **{**(kwargs or {}), "device": torch.device("cpu")}))
        return function(*args, **(kwargs or {}))


class _MadeThere(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Away) and tensor.dim() > 0]
    name = function._schema.name
    if away and here and name not in _MAY_MIX:
        shapes = [tuple(tensor.shape) for tensor in here]
        raise RuntimeError(f"{name} of tensors on two devices; on the CPU are those of shape {shapes}")
    wanted = kwargs.get("device")
    is_away = bool(away) if wanted is None else torch.device(wanted) == AWAY
    if is_away and wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    known = {id(tensor.held): tensor for tensor in away}

    def sent(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not is_away:
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else Away(leaf)

    return args[0] if name == "aten::copy_" else tree_map(sent, found)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Away) else leaf
