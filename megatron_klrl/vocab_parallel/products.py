"""Products with the output layer: into memory that is used again, and into one sum over chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_REFERENCE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of the reference's logits alive beside a whole policy's


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceHead:
    """What gives the reference's logits: its hidden states and output layer, never stored logits. Not differentiable.

    Attributes:
        hidden: ``[n, width]`` final hidden states at the same tokens; the width may differ from the policy's.
        weight: ``[columns, width]`` this rank's part of its output layer.
    """

    hidden: Tensor
    weight: Tensor


class Scratch:
    """Logits of a chunk of tokens at a time, always in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, rows: int) -> None:
        self._hidden, self._weight = hidden.detach(), weight.detach()
        self._memory = hidden.new_empty(rows, len(weight))

    def logits(self, chunk: slice) -> Tensor:
        """``[tokens of the chunk, columns]``; overwritten by the next call."""
        return torch.mm(self._hidden[chunk], self._weight.t(), out=self._memory[: chunk.stop - chunk.start])


def reference_logits(reference: ReferenceHead) -> Iterator[tuple[slice, Tensor]]:
    """All of the reference's logits in runs of tokens, each in the memory of the one before."""
    count, columns = len(reference.hidden), len(reference.weight)
    budget = _REFERENCE_BYTES.get(reference.hidden.device.type, _REFERENCE_BYTES["cuda"])
    rows = min(max(1, budget // max(1, columns * reference.weight.itemsize)), max(count, 1))
    scratch = Scratch(reference.hidden, reference.weight, rows=rows)
    for start in range(0, max(count, 1), rows):
        chunk = slice(start, min(start + rows, count))
        yield chunk, scratch.logits(chunk)


class WeightGradient:
    """Sum over chunks of ``(gradient of logits).T @ hidden``, in one buffer.

    A low-precision weight has its sum in float32: rounded to bf16 after every chunk, the sum would lose what is below
    1/256 of it, and the more the smaller the chunks are. Products stay in low precision on CUDA, where only their
    result is float32; on CPU torch has no such product, and the operands are widened.
    """

    def __init__(self, weight: Tensor, *, parts: int) -> None:
        self._dtype = weight.dtype
        self._wide = parts > 1 and weight.itemsize < torch.float32.itemsize
        self._zero = weight.new_zeros(()).expand(weight.shape)
        self._sum: Tensor | None = None

    def add(self, of_logits: Tensor, hidden: Tensor) -> None:
        """Of one chunk: ``[tokens, columns]`` and ``[tokens, width]``."""
        left = of_logits.t()
        if self._wide and not left.is_cuda:
            left, hidden = left.float(), hidden.float()
        if self._wide and left.is_cuda:
            self._add_wide(left, hidden)
        elif self._sum is None:
            self._sum = torch.mm(left, hidden)
        else:
            self._sum.addmm_(left, hidden)

    def _add_wide(self, left: Tensor, right: Tensor) -> None:
        if self._sum is None:
            self._sum = torch.mm(left, right, out_dtype=torch.float32)
        else:
            torch.addmm(self._sum, left, right, out_dtype=torch.float32, out=self._sum)

    def result(self) -> Tensor:
        """In the weight's type; zero where no chunk was added."""
        return self._zero.contiguous() if self._sum is None else self._sum.to(self._dtype)
