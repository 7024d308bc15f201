"""How the rows of an update become microbatches: which rank takes which rows, and what it feeds to the model.

Every rank plans for all ranks from the same lengths, so that no message is needed and all agree on the number and the
shape of microbatches: pipeline stages exchange tensors of one size, and experts exchange tokens in every microbatch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TrainBatch
from megatron_klrl.mcore.groups import ProcessGroups

Plan = list[list[list[int]]]
"""Data-parallel rank -> microbatch -> numbers of the rows in it."""


class Rows(StrEnum):
    """What one forward pass takes."""

    PADDED = "padded"  # a number of rows, padded to the longest
    PACKED = "packed"  # rows one after the other, up to a number of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How rows are put together.

    Attributes:
        rows: padded or packed.
        size: of one forward pass: rows when padded, most tokens when packed.
        sequence_parallel: activations are cut along the sequence inside the tensor-parallel group.
        token_multiple: what the tokens of a forward pass on one rank must be a multiple of, padding included.
    """

    rows: Rows
    size: int
    sequence_parallel: bool
    token_multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Microbatch[B: (RolloutBatch, TrainBatch)]:
    """One forward pass of one rank.

    Attributes:
        rows: the whole rows, as the loss sees them, ``[b, S]``.
        numbers: ``[b]`` their numbers in the update.
        input_ids: ``[b, s]`` or packed ``[1, s]``; under context parallelism this rank's part of each row.
        position_ids: like ``input_ids``.
        packed: where packed rows begin; None when padded.
        hidden_at: ``[n]`` places in the model's flattened output ``[s * b]`` (``[s]`` packed) from which a response
            token is predicted, row by row.
        target_at: ``[n]`` places of those tokens in the flattened rows ``[b * S]``.
    """

    rows: B
    numbers: Tensor
    input_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams | None
    hidden_at: Tensor
    target_at: Tensor

    @property
    def sequence_length(self) -> int:
        """Tokens along the model's sequence dimension on this context-parallel rank."""
        return self.input_ids.shape[1]


def make[B: (RolloutBatch, TrainBatch)](batch: B, *, batching: Batching, groups: ProcessGroups) -> list[Microbatch[B]]:
    """This rank's microbatches of a batch that every rank holds; as many on every rank, and of one shape.

    Raises:
        ValueError: a row is longer than a pack may be.
    """
    lengths = row_lengths(batch.response_mask)
    every = groups.pp.size() if groups.virtual > 1 else 1
    if batching.rows is Rows.PADDED:
        plan = plan_padded(len(lengths), ranks=groups.dp.size(), size=batching.size, every=every)
        return [_padded(batch, numbers, batching, groups) for numbers in plan[groups.dp.rank()]]
    step = row_step(groups, sequence_parallel=False)
    padded = [_up(length, step) for length in lengths]
    plan = plan_packed(padded, ranks=groups.dp.size(), budget=batching.size, every=every)
    longest = max((sum(padded[number] for number in pack) for rank in plan for pack in rank), default=0)
    # a pack must divide over the ranks that cut it along the sequence
    total = _up(max(longest, 1), pass_step(groups, batching))
    return [_packed(batch, numbers, padded, total, groups) for numbers in plan[groups.dp.rank()]]


def row_lengths(mask: Tensor) -> list[int]:
    """Input tokens that each row needs: up to the one that predicts its last response token; 0 for a blank row."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = (mask * places).amax(-1).tolist() if mask.numel() else [0] * mask.shape[0]
    return lengths


def plan_padded(rows: int, *, ranks: int, size: int, every: int = 1) -> Plan:
    """Consecutive rows, ``size`` to a microbatch; -1 stands for a blank row where the number does not come out.

    Args:
        rows: of the update.
        ranks: data-parallel ranks.
        size: rows of a microbatch.
        every: the number of microbatches is a multiple of it.
    """
    count = _up(-(-rows // (ranks * size)), every)
    numbers = list(range(rows)) + [-1] * (count * ranks * size - rows)
    starts = [[(rank * count + i) * size for i in range(count)] for rank in range(ranks)]
    return [[numbers[start : start + size] for start in row] for row in starts]


def plan_packed(lengths: Sequence[int], *, ranks: int, budget: int, every: int = 1) -> Plan:
    """Rows in packs of at most ``budget`` tokens, as few as it takes, evenly filled; blank rows are left out.

    Longest first, each onto the emptiest pack (Graham 1969): no pack exceeds the mean by more than one row.

    Args:
        lengths: tokens of each row.
        ranks: data-parallel ranks.
        budget: most tokens of a pack.
        every: the number of microbatches is a multiple of it.

    Raises:
        ValueError: a row is longer than a pack may be.
    """
    longest = max(lengths, default=0)
    if longest > budget:
        raise ValueError(f"a row of {longest} tokens does not fit into packs of {budget} tokens")
    order = sorted((n for n, length in enumerate(lengths) if length), key=lambda n: (-lengths[n], n))
    count = _up(max(1, -(-sum(lengths) // (ranks * budget))), every)
    while True:
        packs: list[list[int]] = [[] for _ in range(ranks * count)]
        filled = [0] * len(packs)
        for number in order:
            pack = min(range(len(packs)), key=filled.__getitem__)
            packs[pack].append(number)
            filled[pack] += lengths[number]
        if max(filled) <= budget:
            return [[sorted(pack) for pack in packs[rank * count : (rank + 1) * count]] for rank in range(ranks)]
        count += every


def row_step(groups: ProcessGroups, *, sequence_parallel: bool) -> int:
    """What the length of a row (of a pack) must be a multiple of in this layout."""
    ranks = groups.cp.size()
    return (2 * ranks if ranks > 1 else 1) * (groups.tp.size() if sequence_parallel else 1)


def pass_step(groups: ProcessGroups, batching: Batching) -> int:
    """What the length of the rows of a forward pass must be a multiple of: of padded rows, or of a pack."""
    rows = batching.size if batching.rows is Rows.PADDED else 1
    # every context-parallel rank has its part of each row; together they must have whole multiples
    for_products = groups.cp.size() * batching.token_multiple // math.gcd(rows, batching.token_multiple)
    return math.lcm(row_step(groups, sequence_parallel=batching.sequence_parallel), for_products)


def held(length: int, rank: int, ranks: int) -> Tensor:
    """Places of a row that one context-parallel rank holds: a chunk from the front and its mirror image from the back.

    Causal attention costs more towards the end of a row; so every rank has the same work.
    """
    places = torch.arange(length)
    if ranks == 1:
        return places
    chunks = places.chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _select[B: (RolloutBatch, TrainBatch)](batch: B, numbers: list[int]) -> tuple[B, Tensor]:
    """Rows by number; a blank row is a copy of the first with nothing to learn from."""
    index = torch.tensor(numbers, dtype=torch.long, device=batch.tokens.device)
    rows = batch.rows(index.clamp(min=0))
    return replace(rows, response_mask=rows.response_mask & (index >= 0).unsqueeze(-1)), index


def _padded(batch: Any, numbers: list[int], batching: Batching, groups: ProcessGroups) -> Microbatch:
    rows, index = _select(batch, numbers)
    count, width = rows.response_mask.shape
    length = _up(width, pass_step(groups, batching))
    places = held(length, groups.cp.rank(), groups.cp.size()).to(rows.tokens.device)
    tokens = torch.nn.functional.pad(rows.tokens[:, :-1], (0, length - width))
    mask = torch.nn.functional.pad(rows.response_mask, (0, length - width))[:, places]
    row, local = mask.nonzero(as_tuple=True)
    return Microbatch(
        rows=rows,
        numbers=index,
        input_ids=tokens[:, places].contiguous(),
        position_ids=places.expand(count, -1),
        packed=None,
        hidden_at=local * count + row,
        target_at=row * width + places[local],
    )


def _packed(batch: Any, numbers: list[int], lengths: Sequence[int], total: int, groups: ProcessGroups) -> Microbatch:
    rows, index = _select(batch, numbers)
    width, device = rows.response_mask.shape[1], rows.tokens.device
    inside = [lengths[number] for number in numbers]
    # what is left of the pack is one more row, of padding
    pieces = [*inside, total - sum(inside)] if sum(inside) < total else inside
    parts = [held(piece, groups.cp.rank(), groups.cp.size()) for piece in pieces]
    row = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)]).to(device)
    place = torch.cat(parts).to(device)
    real = (row < len(inside)) & (place < width)
    row_at, place_at = torch.where(real, row, 0), torch.where(real, place, 0)
    if numbers:
        ids = torch.where(real, rows.tokens[row_at, place_at], 0)
        local = (real & rows.response_mask[row_at, place_at]).nonzero().squeeze(-1)
    else:
        ids, local = torch.zeros_like(place), place[:0]
    return Microbatch(
        rows=rows,
        numbers=index,
        input_ids=ids.unsqueeze(0),
        position_ids=place.unsqueeze(0),
        packed=_edges(pieces, device),
        hidden_at=local,
        target_at=row_at[local] * width + place_at[local],
    )


def _edges(pieces: list[int], device: torch.device) -> PackedSeqParams:
    edges = torch.tensor([0, *pieces], device=device).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        cu_seqlens_q_padded=edges,
        cu_seqlens_kv_padded=edges,
        max_seqlen_q=max(pieces),
        max_seqlen_kv=max(pieces),
    )
