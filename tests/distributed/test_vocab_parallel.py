"""Vocabulary shards against the whole vocabulary on one rank, values and gradients."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.runtime import world
from megatron_klrl.vocab_parallel.divergence import entropy, full_kl
from megatron_klrl.vocab_parallel.logprobs import token_logprobs
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.support.ranks import run_ranks

VOCAB, ROWS, LENGTH = 11, 3, 4


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(ROWS, LENGTH, VOCAB, generator=generator)
    ref = 4 * torch.randn(ROWS, LENGTH, VOCAB, generator=generator)
    labels = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB  # every token once: labels on every shard
    upstream = torch.randn(ROWS, LENGTH, generator=generator)
    return logits, ref, labels, upstream


def sharded(dtype: torch.dtype, temperature: float) -> list[Tensor]:
    place = world.join(timeout_s=60)
    logits, ref, labels, upstream = data()
    columns = -(-VOCAB // place.size)
    padded = [torch.nn.functional.pad(t, (0, columns * place.size - VOCAB), value=50.0) for t in (logits, ref)]
    start = columns * place.rank
    local, local_ref = (p[..., start : start + columns].to(dtype) for p in padded)
    local.requires_grad_()
    shard = VocabShard(start=start, size=min(columns, VOCAB - start), group=dist.group.WORLD)
    logprobs = token_logprobs(local, labels, shard=shard, temperature=temperature)
    logprobs.backward(upstream)
    assert local.grad is not None
    of_logprobs, local.grad = local.grad, None
    divergence = full_kl(local, local_ref, shard=shard, temperature=temperature)
    divergence.backward(upstream)
    assert local.grad is not None
    for gradient in (of_logprobs, local.grad):
        assert gradient[..., shard.size :].abs().sum() == 0, "padding columns must get no gradient"
    found = [
        logprobs.detach(),
        of_logprobs[..., : shard.size].float(),
        entropy(local, shard=shard, temperature=temperature),
        divergence.detach(),
        local.grad[..., : shard.size].float(),
    ]
    world.leave()
    return found


def oracle(dtype: torch.dtype, temperature: float) -> list[Tensor]:
    """torch's own softmax in float64 on the same (rounded) logits."""
    logits, ref, labels, upstream = data()
    logits, ref = logits.to(dtype).double().requires_grad_(), ref.to(dtype).double()
    p, q = torch.log_softmax(logits / temperature, -1), torch.log_softmax(ref / temperature, -1)
    picked = p.gather(-1, labels[..., None]).squeeze(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    (of_logprobs,) = torch.autograd.grad(picked, logits, upstream.double(), retain_graph=True)
    (of_divergence,) = torch.autograd.grad(divergence, logits, upstream.double())
    return [picked.detach(), of_logprobs, -(p.exp() * p).sum(-1).detach(), divergence.detach(), of_divergence]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "gradient_rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_shards_equal_the_whole(ranks: int, dtype: torch.dtype, gradient_rtol: float, temperature: float) -> None:
    """Sums are float32 for every input type; the gradient alone is rounded to the logits' type (bf16: to 2**-8)."""
    logprobs, of_logprobs, uncertainty, divergence, of_divergence = oracle(dtype, temperature)
    results = run_ranks(ranks, sharded, dtype, temperature)
    for result in results:
        for found, expected in zip((result[0], result[2], result[3]), (logprobs, uncertainty, divergence), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-6)
    for position, expected in ((1, of_logprobs), (4, of_divergence)):
        whole = torch.cat([result[position] for result in results], -1).double()
        torch.testing.assert_close(whole, expected, rtol=gradient_rtol, atol=5e-6)


def test_whole_vocabulary_needs_no_process_group() -> None:
    logits, ref, labels, _ = data()
    shard = VocabShard.whole(VOCAB)
    expected = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(logits, labels, shard=shard), expected, rtol=1e-6, atol=1e-6)
    assert full_kl(logits, logits.clone(), shard=shard).abs().max() < 1e-6
    assert (full_kl(logits, ref, shard=shard) > 0).all()


def test_gradient_by_finite_differences() -> None:
    logits, _, labels, _ = data()
    shard = VocabShard.whole(VOCAB)
    wide = logits[:1, :2].clone().requires_grad_()
    token_logprobs(wide, labels[:1, :2], shard=shard).sum().backward()
    step = 1e-2
    for column in (0, 5):
        shifted = [logits[:1, :2].clone() for _ in range(2)]
        shifted[0][0, 0, column] += step
        shifted[1][0, 0, column] -= step
        high, low = (torch.log_softmax(s.double(), -1).gather(-1, labels[:1, :2, None]).sum() for s in shifted)
        assert wide.grad is not None
        assert float(wide.grad[0, 0, column]) == pytest.approx(float(high - low) / (2 * step), abs=1e-4)


def test_shapes_are_checked() -> None:
    logits, ref, labels, _ = data()
    shard = VocabShard.whole(VOCAB)
    with pytest.raises(ValueError, match="labels"):
        token_logprobs(logits, labels[:1], shard=shard)
    with pytest.raises(ValueError, match="one shape"):
        full_kl(logits, ref[:1], shard=shard)
