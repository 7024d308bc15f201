"""Checksums of tensors: of the bits, whatever the strides, the blocking or the ranks that hold the parts."""

import pytest
import torch

from megatron_klrl.weight_sync.checksum import checksum, checksums, held_sums, text
from megatron_klrl.weight_sync.plan import Block, Share, Whole, buckets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_is_of_the_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (100 * torch.rand(7, 5, generator=generator)).to(dtype)
    tensor[0, 0], tensor[6, 4] = 1, 2
    expected = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == expected, "strides do not count"
    changed, exchanged = tensor.clone(), tensor.clone()
    changed[3, 2] += 1
    exchanged[0, 0], exchanged[6, 4] = tensor[6, 4], tensor[0, 0]
    assert len({expected, checksum(changed), checksum(exchanged), checksum(tensor.t())}) == 4


def test_a_checksum_by_hand() -> None:
    """Words 1, 2 and -1: the sum is 2, the weighted sum 1 + 4 - 3 = 2; and across the blocks it is computed in."""
    assert checksum(torch.tensor([1, 2, -1])) == f"{2:016x}{2:016x}"
    assert checksum(torch.tensor([-1])) == "f" * 32
    ones = torch.ones((1 << 22) + 3, dtype=torch.uint8)
    assert checksum(ones) == f"{len(ones):016x}{len(ones) * (len(ones) + 1) // 2:016x}"
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0])), "bits, not values"


def test_the_parts_of_several_ranks_add_up_to_the_checksum_of_the_whole() -> None:
    """A matrix cut by rows over two ranks, in turns of two, and a vector that the second rank holds."""
    matrix, vector = torch.randn(8, 3), torch.randn(5)
    rows = {0: [(0, 2), (4, 6)], 1: [(2, 4), (6, 8)]}
    parts = [{"m": torch.cat([matrix[a:b] for a, b in rows[rank]])} for rank in (0, 1)]
    parts[1]["v"] = vector

    def block(name: str, box: tuple[int, int], at: int, width: tuple[int, ...], size: int, held: int) -> Block:
        rest = tuple((0, n) for n in width)
        here = ((at, at + box[1] - box[0]), *rest)
        return Block(name=name, view=(size, *width), box=(box, *rest), part_view=(held, *width), part_box=here)

    cut = [
        Share(holder=rank, part="m", block=block("matrix", box, 2 * turn, (3,), 8, 4))
        for rank, boxes in rows.items()
        for turn, box in enumerate(boxes)
    ]
    whole = Share(holder=1, part="v", block=block("vector", (0, 5), 0, (), 5, 5))
    plan = buckets(
        [
            Whole(name="matrix", size=(8, 3), module="a", shares=tuple(cut)),
            Whole(name="vector", size=(5,), module="b", shares=(whole,)),
        ],
        max_numel=24,
    )
    held = [held_sums(plan, parts[rank], holder=rank) for rank in (0, 1)]
    assert bool((held[0][1] == 0).all())
    assert [text(row) for row in held[0] + held[1]] == list(
        checksums([("matrix", matrix), ("vector", vector)]).values()
    )
