"""Measures, output layer and fused loss over vocabulary shards against the whole vocabulary in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.runtime import world
from megatron_klrl.vocab_parallel.head import ReferenceHead, fused_loss, measure_hidden
from megatron_klrl.vocab_parallel.measures import measure
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.support.ranks import run_ranks
from tests.unit.vocab_parallel.oracle import MEASURES, expected, weighted

VOCAB, TOKENS, WIDTH, COLUMNS = 11, 12, 5, 4  # three shards of 4, 4 and 3 columns; a fourth has padding alone
ALL = (*MEASURES, "ref_logprobs")


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (TOKENS, WIDTH), "weight": (VOCAB, WIDTH), "ref_hidden": (TOKENS, 3), "ref_weight": (VOCAB, 3)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {name: torch.randn(TOKENS, generator=generator) for name in MEASURES}


def labels() -> Tensor:
    """Every token of the vocabulary, so some on every shard."""
    return torch.arange(TOKENS) % VOCAB


def place_shard() -> VocabShard:
    place = world.join(timeout_s=60)
    start = COLUMNS * place.rank
    return VocabShard(start=start, size=max(0, min(COLUMNS, VOCAB - start)), group=dist.group.WORLD)


def of_shard(whole: Tensor, shard: VocabShard, fill: float) -> Tensor:
    """This rank's rows of a weight (or columns of transposed logits), padded to a full shard."""
    padded = torch.full((COLUMNS, whole.shape[1]), fill)
    padded[: shard.size] = whole[shard.start : shard.start + shard.size]
    return padded


def from_logits(dtype: torch.dtype, temperature: float, overwrite: bool) -> list[Tensor]:  # noqa: FBT001
    shard, given = place_shard(), data()
    logits = of_shard((given["hidden"] @ given["weight"].T).T, shard, 50.0).T.to(dtype).contiguous().requires_grad_()
    ref = of_shard((given["ref_hidden"] @ given["ref_weight"].T).T, shard, -50.0).T.to(dtype).contiguous()
    found = measure(
        logits, labels(), shard=shard, temperature=temperature, ref_logits=ref, entropy=True, overwrite=overwrite
    )
    weighted(found, {name: given[name] for name in MEASURES}).backward()
    assert logits.grad is not None
    assert logits.grad[:, shard.size :].abs().sum() == 0, "padding columns must get no gradient"
    world.leave()
    return [*(getattr(found, name).detach() for name in ALL), logits.grad[:, : shard.size].float()]


def from_hidden(form: str) -> list[Tensor]:
    """Value, this rank's rows of the weight's gradient, and the sum over ranks of the hidden states' gradient."""
    shard, given = place_shard(), data()
    hidden = given["hidden"].requires_grad_()
    weight = of_shard(given["weight"], shard, 9.0).requires_grad_()
    reference = ReferenceHead(hidden=given["ref_hidden"], weight=of_shard(given["ref_weight"], shard, -9.0))
    upstream = {name: given[name] for name in MEASURES}
    if form == "fused":
        chunks = [slice(0, 5), slice(5, 5), slice(5, TOKENS)]
        value = fused_loss(
            hidden,
            weight,
            labels(),
            shard=shard,
            reference=reference,
            entropy=True,
            chunks=chunks,
            loss=lambda found, number: weighted(found, {name: up[chunks[number]] for name, up in upstream.items()}),
        )
    else:
        size = None if form == "whole" else 5
        found = measure_hidden(
            hidden, weight, labels(), shard=shard, reference=reference, entropy=True, chunk_tokens=size
        )
        value = weighted(found, upstream)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    dist.all_reduce(hidden.grad)
    assert weight.grad[shard.size :].abs().sum() == 0
    world.leave()
    return [value.detach(), weight.grad[: shard.size], hidden.grad]


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize(
    ("dtype", "gradient_rtol", "overwrite"), [(torch.float32, 1e-5, False), (torch.bfloat16, 2**-8, True)]
)
def test_shards_equal_the_whole(ranks: int, dtype: torch.dtype, gradient_rtol: float, *, overwrite: bool) -> None:
    """Sums are float32 for every type; the gradient alone is rounded to the logits' (bf16: by 2**-9)."""
    given = data()
    logits = (given["hidden"] @ given["weight"].T).to(dtype).double().requires_grad_()
    ref = (given["ref_hidden"] @ given["ref_weight"].T).to(dtype).double()
    right = expected(logits, ref, labels(), temperature=0.6)
    (gradient,) = torch.autograd.grad(weighted(right, {name: given[name] for name in MEASURES}), logits)
    results = run_ranks(ranks, from_logits, dtype, 0.6, overwrite)
    for result in results:
        for name, found, same in zip(ALL, result, results[0], strict=False):
            torch.testing.assert_close(found.double(), getattr(right, name).detach(), rtol=1e-6, atol=5e-6)
            assert torch.equal(found, same), "every rank has the same bits"
    whole = torch.cat([result[-1] for result in results], -1).double()
    torch.testing.assert_close(whole, gradient, rtol=gradient_rtol, atol=1e-5)


@pytest.mark.parametrize("form", ["whole", "chunked", "fused"])
def test_forms_of_the_head_over_shards(form: str) -> None:
    given = data()
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    ref = given["ref_hidden"].double() @ given["ref_weight"].double().T
    right = expected(hidden @ weight.T, ref, labels(), temperature=1.0)
    value = weighted(right, {name: given[name] for name in MEASURES})
    value.backward()
    results = run_ranks(3, from_hidden, form)
    of_weight = torch.cat([result[1] for result in results]).double()
    torch.testing.assert_close(of_weight, weight.grad, rtol=1e-4, atol=2e-5)
    for found, _, of_hidden in results:
        torch.testing.assert_close(found.double(), value.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_hidden.double(), hidden.grad, rtol=1e-4, atol=2e-5)


def one_gather() -> int:
    """Collectives of a forward and backward that ask for everything."""
    shard, given = place_shard(), data()
    logits = torch.randn(TOKENS, COLUMNS, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        found = measure(logits, labels(), shard=shard, ref_logits=torch.randn(TOKENS, COLUMNS), entropy=True)
        weighted(found, {name: given[name] for name in MEASURES}).backward()
    world.leave()
    return sum(event.count for event in record.key_averages() if event.key.startswith("c10d::"))


def test_one_collective_in_all() -> None:
    assert run_ranks(2, one_gather) == [1, 1]
