"""How rows become microbatches: nothing is lost, nothing doubled, every rank agrees."""

import pytest
import torch

from megatron_klrl.mcore.microbatches import held, plan_packed, plan_padded, row_lengths


@pytest.mark.parametrize(("rows", "ranks", "size", "every"), [(6, 1, 2, 1), (7, 2, 3, 1), (5, 2, 4, 4), (1, 4, 2, 1)])
def test_padded_plan_holds_every_row_once(rows: int, ranks: int, size: int, every: int) -> None:
    plan = plan_padded(rows, ranks=ranks, size=size, every=every)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1, "every rank has as many microbatches"
    assert len(plan[0]) % every == 0
    assert all(len(microbatch) == size for rank in plan for microbatch in rank)
    numbers = [number for rank in plan for microbatch in rank for number in microbatch]
    assert [number for number in numbers if number >= 0] == list(range(rows))


LENGTHS = [5, 17, 0, 9, 9, 3, 12, 1, 16, 8]


@pytest.mark.parametrize(("ranks", "budget", "every"), [(1, 100, 1), (1, 17, 1), (2, 20, 1), (3, 24, 2), (2, 30, 4)])
def test_packed_plan_fills_packs_within_the_budget(ranks: int, budget: int, every: int) -> None:
    plan = plan_packed(LENGTHS, ranks=ranks, budget=budget, every=every)
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % every == 0
    packs = [pack for rank in plan for pack in rank]
    assert sorted(number for pack in packs for number in pack) == [n for n, length in enumerate(LENGTHS) if length]
    filled = [sum(LENGTHS[number] for number in pack) for pack in packs]
    assert max(filled) <= budget
    assert max(filled) - min(filled) <= max(LENGTHS), "no pack is fuller than another by more than one row"


def test_a_packed_plan_is_as_short_as_it_can_be() -> None:
    """Eight rows of five tokens fill two packs of twenty, not three."""
    assert len(plan_packed([5] * 8, ranks=1, budget=20)[0]) == 2


def test_a_row_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row of 17 tokens does not fit into packs of 16 tokens"):
        plan_packed(LENGTHS, ranks=1, budget=16)


def test_nothing_to_do_is_still_one_microbatch_a_rank() -> None:
    """Ranks that exchange tokens or stages must take part even in an empty update."""
    assert plan_packed([0, 0], ranks=2, budget=8) == [[[]], [[]]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_context_ranks_hold_every_place_once_and_equal_work(ranks: int) -> None:
    length = 16
    parts = [held(length, rank, ranks) for rank in range(ranks)]
    assert torch.cat(parts).sort().values.tolist() == list(range(length))
    work = [int((part + 1).sum()) for part in parts]  # a place attends to itself and all before it
    assert len(set(work)) == 1


def test_row_lengths_end_at_the_last_response_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert row_lengths(mask) == [4, 5, 0]
