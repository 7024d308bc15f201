"""Weights that are kept in 8 bits: read and written as the numbers that they stand for.

Transformer Engine's tensors of this kind behave as bf16 ones in most operations and convert without being asked. Not
here: a conversion that nobody sees rounds twice, or keeps a copy of the whole model alive.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor


@torch.no_grad()
def numbers(tensor: Tensor) -> Tensor:
    """What a tensor stands for, detached: of an 8-bit one a copy in bfloat16, of any other the tensor itself.

    Rounding the copy gives the same numbers again: the largest of an 8-bit weight is that of the bfloat16 weight it was
    rounded from, so the scale is, and the others lie far from the middle between two.
    """
    kept: Any = tensor.detach()
    return kept.dequantize() if is_float8tensor(tensor) else kept


@torch.no_grad()
def to_write(target: Tensor) -> Tensor:
    """Memory to put a parameter's new numbers into, for ``written``: its own unless it has 8 bits."""
    if not is_float8tensor(target):
        return target
    return torch.empty(target.shape, dtype=target.dtype, device=target.device)


@torch.no_grad()
def written(target: Tensor, new: Tensor) -> None:
    """Take over what has been put into ``to_write(target)``: an 8-bit parameter is rounded from it.

    As long as no optimizer has taken the unrounded weights for its own, they follow.
    """
    if new is target:
        return
    target.copy_(new)
    unrounded = getattr(target, "get_high_precision_init_val", lambda: None)()
    if unrounded is not None:
        unrounded.copy_(new)


class Values(Mapping[str, Tensor]):
    """Something of every parameter by name, taken when it is looked up.

    What is taken may be a copy, of an 8-bit weight for example. The last one is kept, for the tensors of a joined
    parameter are looked up one after another, and no other.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, value: Callable[..., Tensor]) -> None:
        """Take the parameters.

        Args:
            parameters: by name.
            value: what to take of one.
        """
        self._parameters, self._value = parameters, value
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # first, so that there are never two
            self._last = (name, self._value(self._parameters[name]))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
