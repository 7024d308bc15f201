"""Microbatches, and the head on them, on tensors of another device than the CPU's; ranks are counted, none started."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.config.algorithm import Surrogate
from megatron_klrl.losses.policy_loss import Separable
from megatron_klrl.mcore import microbatches
from megatron_klrl.mcore.head import Head
from megatron_klrl.mcore.microbatches import Batching, Rows
from megatron_klrl.mcore.passes import AtHead
from megatron_klrl.rl.surrogates import SURROGATES
from megatron_klrl.runtime import world as ranks
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.support.elsewhere import AWAY, elsewhere, sent
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch

WIDTH, VOCABULARY = 8, 50
BATCHINGS = {
    "padded": Batching(rows=Rows.PADDED, size=4, sequence_parallel=False, token_multiple=16),
    "packed": Batching(rows=Rows.PACKED, size=40, sequence_parallel=False, token_multiple=16),
}


CLIPS = {"clip_low": 0.2, "clip_high": 0.2}
LOSSES = {
    separable: replace(
        policy_loss(rollout_batch()), surrogate=SURROGATES[surrogate].bounded(**CLIPS), entropy_bonus=0.01
    )
    for separable, surrogate in ((Separable.TOKENS, Surrogate.PPO_CLIP), (Separable.SEQUENCES, Surrogate.GSPO))
}


@contextmanager
def ranks_of_this_test() -> Iterator[None]:
    ranks.join(timeout_s=60)
    try:
        yield
    finally:
        ranks.leave()


class Group:
    """Of one rank; or of two, of which this is the second."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.ranks - 1


def groups(**sizes: int) -> Any:
    return SimpleNamespace(**{name: Group(sizes.get(name, 1)) for name in ("tp", "pp", "cp", "ep", "dp")}, virtual=1)


@pytest.mark.parametrize("sizes", [{}, {"cp": 2}, {"dp": 2}], ids=["one", "cp2", "dp2"])
@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
def test_microbatches(batching: Batching, sizes: dict[str, int]) -> None:
    wanted = microbatches.make(rollout_batch(), batching=batching, groups=groups(**sizes))
    with elsewhere() as away:
        found = microbatches.make(sent(rollout_batch(), away), batching=batching, groups=groups(**sizes))
        for here, there in zip(wanted, found, strict=True):
            for name in ("input_ids", "position_ids", "hidden_at", "target_at", "numbers"):
                assert getattr(there, name).device == AWAY
                assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
            if here.packed is not None:
                assert there.packed.cu_seqlens_q.device == AWAY


def at_head(name: str, separable: Separable, send: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Log-probabilities, what the loss reports, and gradients, microbatch by microbatch."""
    one_rank: Any = SimpleNamespace(**vars(groups()) | {"tp": dist.group.WORLD})
    head = Head(
        shard=VocabShard.whole(VOCABULARY), groups=one_rank, sequence_parallel=False, temperature=0.7, chunk_tokens=7
    )
    batch = sent(train_batch(rollout_batch()), send)
    found: list[Tensor] = []
    for number, one in enumerate(microbatches.make(batch, batching=BATCHINGS[name], groups=groups())):
        generator = torch.Generator().manual_seed(number)
        rows, length = one.input_ids.shape
        hidden = send(torch.randn(length, rows, WIDTH, generator=generator)).requires_grad_()
        weight = send(torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
        at, sums = AtHead(hidden=hidden, weight=weight), []
        with torch.no_grad():
            found.append(head.measure(one, at, reference=None).logprobs)
        head.loss(one, at, loss=LOSSES[separable], reference=None, report=sums.append).backward()
        found += [value for each in sums for value in each.values()]
        found += [hidden.grad, weight.grad]  # type: ignore[list-item]
    return found


def same_there_and_here(name: str, separable: Separable) -> bool:
    with ranks_of_this_test():
        wanted = at_head(name, separable, lambda tensor: tensor)
        with elsewhere() as away:
            found = at_head(name, separable, away)
    assert {tensor.device for tensor in found} == {AWAY}
    return all(torch.equal(there.cpu(), here) for there, here in zip(found, wanted, strict=True))


@pytest.mark.parametrize("separable", Separable)
@pytest.mark.parametrize("name", BATCHINGS)
def test_the_head(name: str, separable: Separable) -> None:
    assert LOSSES[separable].separable is separable
    assert run_ranks(1, same_there_and_here, name, separable) == [True]
