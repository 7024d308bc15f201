"""Which block of which Hugging Face tensor lies where in a tensor-parallel rank's parameters.

One description serves both directions: loading copies blocks from Hugging Face tensors into parameters, exporting and
resharding copy the same blocks back. No process groups, no tensors.
"""

from collections.abc import Iterator

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.mcore.layout import Cut, Join, Parameter, hf_sizes
from megatron_klrl.weight_sync.plan import Block


def blocks(parameter: Parameter, shape: ModelShape, *, rank: int, ranks: int) -> Iterator[Block]:
    """The blocks of one tensor-parallel rank's part of a parameter.

    Args:
        parameter: of the whole model.
        shape: of the model.
        rank: of the tensor-parallel group.
        ranks: its size.
    """
    if parameter.cut is Cut.WHOLE:
        rank, ranks = 0, 1
    sizes = hf_sizes(parameter, shape)
    if parameter.join is Join.QKV:
        yield from _qkv(parameter, sizes, shape, rank, ranks)
    elif parameter.join is Join.GATE_UP:
        yield from _stacked(parameter, sizes, rank, ranks)
    else:
        yield _single(parameter, sizes[0], rank, ranks)


def _single(parameter: Parameter, size: tuple[int, ...], rank: int, ranks: int) -> Block:
    dimension = 1 if parameter.cut is Cut.COLUMNS else 0
    part = -(-size[dimension] // ranks)  # the vocabulary may be padded on the last rank
    start, end = rank * part, min((rank + 1) * part, size[dimension])
    local = tuple(part if d == dimension else length for d, length in enumerate(size))
    return Block(
        name=parameter.hf[0],
        view=size,
        box=tuple((start, end) if d == dimension else (0, length) for d, length in enumerate(size)),
        part_view=local,
        part_box=tuple((0, end - start) if d == dimension else (0, length) for d, length in enumerate(size)),
    )


def _stacked(parameter: Parameter, sizes: list[tuple[int, ...]], rank: int, ranks: int) -> Iterator[Block]:
    """Gate and up: a rank holds its rows of one after its rows of the other."""
    for number, (name, (rows, columns)) in enumerate(zip(parameter.hf, sizes, strict=True)):
        part = rows // ranks
        yield Block(
            name=name,
            view=(1, rows, columns),
            box=((0, 1), (rank * part, (rank + 1) * part), (0, columns)),
            part_view=(len(sizes), part, columns),
            part_box=((number, number + 1), (0, part), (0, columns)),
        )


def _qkv(
    parameter: Parameter, sizes: list[tuple[int, ...]], shape: ModelShape, rank: int, ranks: int
) -> Iterator[Block]:
    """Per key-value group: its query heads, its key head, its value head."""
    groups, queries, width = shape.kv_heads // ranks, shape.heads // shape.kv_heads, shape.head_dim
    rest = sizes[0][1:]
    whole = tuple((0, length) for length in rest)
    first = 0
    for name, heads in zip(parameter.hf, (queries, 1, 1), strict=True):
        yield Block(
            name=name,
            view=(shape.kv_heads, heads, width, *rest),
            box=((rank * groups, (rank + 1) * groups), (0, heads), (0, width), *whole),
            part_view=(groups, queries + 2, width, *rest),
            part_box=((0, groups), (first, first + heads), (0, width), *whole),
        )
        first += heads
