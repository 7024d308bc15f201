"""The plan of a resharding, checked element by element and without any rank."""

import pytest
import torch
from torch import Tensor

from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.mcore.blocks import blocks
from megatron_klrl.mcore.layout import Cut, hf_sizes, parameters
from megatron_klrl.weight_sync.plan import Block, Share, Whole, buckets
from tests.support.models import FAMILIES, MIXTURE, write_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every family's shape."""
    root = tmp_path_factory.mktemp("models")
    configs = {**FAMILIES, "mixture": MIXTURE}
    return {name: describe_model(write_model(root / name, config)) for name, config in configs.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "mixture"])
def test_blocks_cover_every_element_once_on_both_sides(shapes: dict, family: str, ranks: int) -> None:
    shape = shapes[family]
    for parameter in parameters(shape):
        cut = 1 if parameter.cut is Cut.WHOLE else ranks
        counts = {name: torch.zeros(size) for name, size in zip(parameter.hf, hf_sizes(parameter, shape), strict=True)}
        held = 0
        for rank in range(cut):
            found = list(blocks(parameter, shape, rank=rank, ranks=cut))
            part = torch.zeros(found[0].part_view)
            for block in found:
                block.of_whole(counts[block.name]).add_(1)
                block.of_part(part).add_(1)
                assert block.of_part(part).shape == block.of_whole(counts[block.name]).shape
            assert part.max() <= 1
            held += int(part.sum())
        for name, count in counts.items():
            assert (count == 1).all(), name
        assert held == sum(count.numel() for count in counts.values())


def test_queries_keys_and_values_lie_group_by_group(shapes: dict) -> None:
    """Megatron's fused order told independently: for each key-value group its query heads, its key, its value."""
    shape = shapes["qwen3_tied"]  # 4 query heads, 2 groups of key and value
    (parameter,) = [p for p in parameters(shape) if p.layer == 0 and p.name.endswith("linear_qkv.weight")]
    whole = {name: torch.randn(size) for name, size in zip(parameter.hf, hf_sizes(parameter, shape), strict=True)}
    query, key, value = (tensor.split(shape.head_dim) for tensor in whole.values())
    expected = torch.cat([query[0], query[1], key[0], value[0], query[2], query[3], key[1], value[1]])
    part = torch.empty_like(expected)
    for block in blocks(parameter, shape, rank=0, ranks=1):
        block.of_part(part).copy_(block.of_whole(whole[block.name]))
    assert torch.equal(part, expected)
    second = torch.empty(expected.shape[0] // 2, expected.shape[1])
    for block in blocks(parameter, shape, rank=1, ranks=2):
        block.of_part(second).copy_(block.of_whole(whole[block.name]))
    assert torch.equal(second, expected.chunk(2)[1])


def whole(name: str, numel: int, *, module: str | None = None, covered: int | None = None) -> Whole:
    size = (covered or numel,)
    block = Block(name=name, view=(numel,), box=((0, covered or numel),), part_view=size, part_box=((0, size[0]),))
    share = Share(holder=0, part=name, block=block)
    return Whole(name=name, size=(numel,), module=module or name, shares=(share,))


def test_buckets_keep_order_bounds_and_modules_together() -> None:
    tensors = [whole("a", 5), whole("b", 4), whole("q", 3, module="qkv"), whole("k", 3, module="qkv"), whole("c", 30)]
    found = buckets([*tensors, whole("d", 1)], max_numel=10)
    assert [[tensor.name for tensor in bucket.tensors] for bucket in found] == [["a", "b"], ["q", "k"], ["c"], ["d"]]
    assert found[1].starts == (0, 3)
    assert [bucket.numel for bucket in found] == [9, 6, 30, 1]


def test_views_tile_the_flat_memory() -> None:
    (bucket,) = buckets([whole("a", 5), whole("b", 4)], max_numel=100)
    flat = torch.arange(9.0)
    named: dict[str, Tensor] = dict(bucket.views(flat))
    assert named["a"].tolist() == [0, 1, 2, 3, 4]
    assert named["b"].tolist() == [5, 6, 7, 8]


def test_a_gap_is_an_error_of_the_plan() -> None:
    with pytest.raises(ValueError, match="a: its shares cover 4 of 5 elements"):
        buckets([whole("a", 5, covered=4)], max_numel=10)
