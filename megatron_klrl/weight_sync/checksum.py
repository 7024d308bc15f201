"""Checksums of tensors that do not depend on how a tensor is laid out, cut or moved."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_klrl.weight_sync.plan import Box, Bucket

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements that exist as 64-bit integers at the same time


def checksum(tensor: Tensor) -> str:
    """128 bits of a tensor's content: sums of its bit patterns, plain and weighted by position, both modulo 2^64.

    Integer sums do not depend on their order, so the value is the same on every device and in every blocking. Elements
    count in row-major order, whatever the strides. One changed element always changes the plain sum, two exchanged ones
    always the weighted sum.
    """
    at_least_one = tensor.detach().reshape(tensor.shape or (1,))
    return text(_sums(at_least_one, view=at_least_one.shape, box=tuple((0, size) for size in at_least_one.shape)))


def checksums(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Of every tensor of a stream."""
    return {name: checksum(tensor) for name, tensor in weights}


def digest(found: Mapping[str, str]) -> str:
    """One checksum for all, by name: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(sorted(found.items())).encode(), digest_size=16).hexdigest()


def held_sums(plan: Sequence[Bucket], parts: Mapping[str, Tensor], *, holder: int) -> Tensor:
    """One rank's contribution to the checksum of every tensor of a plan; their sum over the ranks is the checksum.

    The parts are read where they lie: what is compared with it has been moved by something else.

    Args:
        plan: which rank gives which block.
        parts: this rank's parts by name.
        holder: this rank's number in the plan.

    Returns:
        ``[tensors, 2]`` int64; ``text`` makes a checksum of a row of the sum.
    """
    tensors = [tensor for bucket in plan for tensor in bucket.tensors]
    device = next(iter(parts.values())).device
    found = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors):
        for share in tensor.shares:
            if share.holder == holder:
                block = share.block.of_part(parts[share.part].detach())
                found[number] += _sums(block, view=share.block.view, box=share.block.box)
    return found


def text(sums: Tensor) -> str:
    """A checksum as 32 hexadecimal digits, from its two sums."""
    plain, weighted = (value % 2**64 for value in sums.tolist())
    return f"{plain:016x}{weighted:016x}"


def _sums(block: Tensor, *, view: Sequence[int], box: Box) -> Tensor:
    """``[2]`` int64 of a block that lies at ``box`` of a tensor looked at as ``view``."""
    strides = [prod(view[dimension + 1 :]) for dimension in range(len(view))]
    step = max(1, _CHUNK // max(1, prod(block.shape[1:])))
    sums = torch.zeros(2, dtype=torch.int64, device=block.device)
    for start in range(0, block.shape[0], step):
        part = block[start : start + step].contiguous()
        words = part.view(_WORDS[part.element_size()]).to(torch.int64)
        places = torch.ones((), dtype=torch.int64, device=block.device)
        for dimension, size in enumerate(part.shape):
            first = box[dimension][0] + (start if dimension == 0 else 0)
            along = torch.arange(first, first + size, device=block.device)
            places = places.unsqueeze(-1) + along * strides[dimension]
        sums += torch.stack([words.sum(), (words * places).sum()])  # int64 arithmetic wraps, which is the modulus
    return sums
