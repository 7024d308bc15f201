"""Measures from logits: values and gradients against float64, in every type, layout and mode."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.measures import TokenMeasures, measure
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.unit.vocab_parallel.oracle import MEASURES, Allocations, expected, weighted

SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(MEASURES, size)]


def problem(rows: int = 6, columns: int = 37, *, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(rows, columns, generator=generator)
    ref = logits + torch.randn(rows, columns, generator=generator)
    return logits, ref, torch.randint(0, columns, (rows,), generator=generator)


def upstream_of(names: tuple[str, ...], rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, generator=generator) for name in names}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_values_and_gradients(names: tuple[str, ...], temperature: float, *, overwrite: bool) -> None:
    """float32 sums of 37 terms: a few units in the last place of logits of ten (1e-6) over the temperature."""
    logits, ref, labels = problem()
    upstream = upstream_of(names, len(labels))
    wide = logits.double().requires_grad_()
    right = expected(wide, ref.double(), labels, temperature=temperature)
    (gradient,) = torch.autograd.grad(weighted(right, upstream), wide)

    logits.requires_grad_()
    found = measure(
        logits,
        labels,
        shard=VocabShard.whole(37),
        temperature=temperature,
        ref_logits=ref,
        entropy=True,
        overwrite=overwrite,
    )
    for name in (*MEASURES, "ref_logprobs"):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), getattr(right, name), rtol=1e-6, atol=1e-5)
    weighted(found, upstream).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=2e-5)
    assert (logits.grad.data_ptr() == logits.data_ptr()) is overwrite
    assert found.ref_logprobs is not None
    assert not found.ref_logprobs.requires_grad


def test_bf16_logits_are_measured_in_float32() -> None:
    """Values as of the rounded logits in float64; the gradient alone is rounded to bf16, by 2**-9 relative."""
    logits, ref, labels = (each.bfloat16() if each.is_floating_point() else each for each in problem())
    upstream = upstream_of(MEASURES, len(labels))
    wide = logits.double().requires_grad_()
    right = expected(wide, ref.double(), labels, temperature=0.7)
    (gradient,) = torch.autograd.grad(weighted(right, upstream), wide)
    logits.requires_grad_()
    found = measure(logits, labels, shard=VocabShard.whole(37), temperature=0.7, ref_logits=ref, entropy=True)
    for name in (*MEASURES, "ref_logprobs"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(right, name), rtol=1e-6, atol=1e-5)
    weighted(found, upstream).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=2**-8, atol=2e-5)


def test_gradient_of_a_nearly_certain_label_is_exact_in_bf16() -> None:
    """1 - p is far below what bf16 can hold next to p: it must not be the difference of two rounded numbers."""
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    logits[0, 3] = 12.0
    logits.requires_grad_()
    measure(logits, torch.tensor([3]), shard=VocabShard.whole(8)).logprobs.sum().backward()
    certain = 7 * math.exp(-12) / (1 + 7 * math.exp(-12))
    assert logits.grad is not None
    assert float(logits.grad[0, 3]) == pytest.approx(certain, rel=2**-8)


def test_padding_columns_carry_no_mass_and_get_no_gradient() -> None:
    logits, ref, labels = problem()
    padded = torch.nn.functional.pad(logits, (0, 3), value=80.0).requires_grad_()
    found = measure(
        padded,
        labels,
        shard=VocabShard.whole(37),
        ref_logits=torch.nn.functional.pad(ref, (0, 3), value=-9.0),
        entropy=True,
    )
    alone = measure(logits, labels, shard=VocabShard.whole(37), ref_logits=ref, entropy=True)
    for name in (*MEASURES, "ref_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=0, atol=0)
    weighted(found, upstream_of(MEASURES, len(labels))).backward()
    assert padded.grad is not None
    assert padded.grad[:, 37:].abs().sum() == 0
    assert padded.grad[:, :37].abs().sum() > 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_slice_of_a_batch_of_sequences(*, overwrite: bool) -> None:
    """Logits without their last position do not lie evenly; they are neither copied nor confused."""
    whole = problem(12)[0].view(3, 4, 37)
    labels = torch.arange(9).view(3, 3)
    own = whole.clone().requires_grad_()
    found = measure(own[:, :-1], labels, shard=VocabShard.whole(37), entropy=True, overwrite=overwrite)
    (found.logprobs.sum() + found.entropy.sum()).backward()  # type: ignore[union-attr]
    plain = whole.clone().requires_grad_()
    logprobs = torch.log_softmax(plain[:, :-1], -1)
    picked = logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.logprobs, picked, rtol=1e-6, atol=1e-5)
    (picked.sum() - (logprobs.exp() * logprobs).sum()).backward()
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-5, atol=2e-5)


def test_shapes_of_no_and_of_one_token() -> None:
    shard = VocabShard.whole(5)
    nothing = torch.empty(0, 5, requires_grad=True)
    found = measure(nothing, torch.empty(0, dtype=torch.long), shard=shard, entropy=True, ref_logits=torch.empty(0, 5))
    weighted(found, {name: torch.empty(0) for name in MEASURES}).backward()
    assert nothing.grad is not None
    assert nothing.grad.shape == (0, 5)
    assert measure(torch.randn(5), torch.tensor(2), shard=shard).logprobs.shape == ()


def test_tiny_divergences_do_not_drown() -> None:
    """A difference of two float32 log Z of 40 is off by 4e-6 and drowns them; here half the square of that remains."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(4, 4096, generator=generator)
    labels = torch.zeros(4, dtype=torch.long)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):  # divergences from 1e-2 to 1e-10
        ref = (logits.double() + size * torch.randn(4, 4096, generator=generator, dtype=torch.double)).float()
        right = expected(logits.double(), ref.double(), labels, temperature=1.0).full_kl
        found = measure(logits, labels, shard=VocabShard.whole(4096), ref_logits=ref).full_kl
        assert found is not None
        torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=2e-11)
        assert (found >= 0).all()


def test_divergence_of_equal_logits_is_exactly_zero_with_no_gradient() -> None:
    logits = problem(5, 1000)[0].requires_grad_()
    labels = torch.zeros(5, dtype=torch.long)
    shard = VocabShard.whole(1000)
    found = measure(logits, labels, shard=shard, temperature=0.7, ref_logits=logits.detach().clone())
    assert found.full_kl is not None
    assert (found.full_kl == 0).all()
    found.full_kl.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_a_divergence_of_disjoint_distributions_does_not_overflow() -> None:
    logits = torch.tensor([[0.0, -200.0, 3.0]], requires_grad=True)
    ref = torch.tensor([[-200.0, 0.0, -150.0]])
    labels = torch.tensor([2])
    found = measure(logits, labels, shard=VocabShard.whole(3), ref_logits=ref).full_kl
    wide = logits.detach().double().requires_grad_()
    right = expected(wide, ref.double(), labels, temperature=1.0).full_kl
    assert found is not None
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=0)
    found.sum().backward()
    right.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_non_finite_logits_are_not_hidden() -> None:
    logits, ref, labels = problem()
    logits[0, 5], logits[1, 5], logits[2, 5] = math.nan, math.inf, -math.inf
    found = measure(logits, labels, shard=VocabShard.whole(37), ref_logits=ref, entropy=True)
    assert found.logprobs[:2].isnan().all()
    assert found.logprobs[2:].isfinite().all()
    for value in (found.entropy, found.full_kl):
        assert value is not None
        assert not value[:3].isfinite().any()
        assert value[3:].isfinite().all()


def test_a_label_outside_the_vocabulary_has_probability_zero() -> None:
    logits, _, labels = problem()
    labels[1], labels[2] = -100, 37
    logprobs = measure(logits, labels, shard=VocabShard.whole(37)).logprobs
    assert (logprobs[1:3] == -math.inf).all()
    assert logprobs[[0, 3, 4, 5]].isfinite().all()


def test_what_is_not_asked_is_not_given_and_not_computed() -> None:
    logits, _, labels = problem()
    logits.requires_grad_()
    shard = VocabShard.whole(37)
    with Allocations() as plain:
        found = measure(logits, labels, shard=shard)
        found.logprobs.sum().backward()
    assert found == TokenMeasures(logprobs=found.logprobs)
    assert not of_entropy_or_divergence(plain)
    with Allocations() as full:
        found = measure(logits, labels, shard=shard, ref_logits=logits.detach(), entropy=True)
        weighted(found, upstream_of(MEASURES, len(labels))).backward()
    assert of_entropy_or_divergence(full) == {"addcmul", "clamp"}  # so that the empty set above says something
    assert plain.operations.count("aten.sum.dim_IntList") < full.operations.count("aten.sum.dim_IntList")


def test_gradients_that_do_not_arrive_cost_nothing() -> None:
    logits, ref, labels = problem()
    logits.requires_grad_()
    found = measure(logits, labels, shard=VocabShard.whole(37), ref_logits=ref, entropy=True)
    with Allocations() as record:
        (found.logprobs.sum() * 2).backward()
    assert not of_entropy_or_divergence(record)


def of_entropy_or_divergence(record: Allocations) -> set[str]:
    """Operations on whole rows that only their passes need."""
    return {name for name in ("addcmul", "clamp") if any(name in each for each in record.operations)}


def test_there_are_no_second_derivatives() -> None:
    """And they are not silently zero."""
    logits, _, labels = problem()
    logits.requires_grad_()
    logprobs = measure(logits, labels, shard=VocabShard.whole(37)).logprobs
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_backward_after_overwriting_is_an_error() -> None:
    logits, _, labels = problem()
    logits.requires_grad_()
    shard = VocabShard.whole(37)
    kept = measure(logits, labels, shard=shard).logprobs.sum()
    kept.backward(retain_graph=True)
    once = torch.clone(logits.grad)  # type: ignore[arg-type]
    kept.backward()
    torch.testing.assert_close(logits.grad, 2 * once)
    overwritten = measure(logits, labels, shard=shard, overwrite=True).logprobs.sum()
    overwritten.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        overwritten.backward()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process, so that copies inside torch's operations count: nothing beside buffers that stay in the cache.

    Logits of 125 MiB at least, beside which neither those buffers (5 MiB) nor what an allocator does matter.
    """
    monkeypatch.setattr(kernels._InUse, "kernels", kernels.Kernels.EAGER)
    logits = torch.randn(2000, 32768).to(dtype)
    bytes_of_logits = logits.numel() * logits.itemsize
    labels = torch.arange(2000)

    def extra(*, overwrite: bool) -> float:
        own = logits.clone().requires_grad_()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # restarts VmHWM
        found = measure(own, labels, shard=VocabShard.whole(32768), entropy=True, overwrite=overwrite)
        found.logprobs.sum().backward()
        return _memory("VmHWM") - before

    extra(overwrite=True)  # what torch keeps after a first call is no part of the question
    assert extra(overwrite=True) < 0.25 * bytes_of_logits
    assert extra(overwrite=False) < 1.25 * bytes_of_logits


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def test_shapes_are_checked() -> None:
    logits, ref, labels = problem()
    shard = VocabShard.whole(37)
    with pytest.raises(ValueError, match=r"labels \(5,\).*logits \(6, 37\)"):
        measure(logits, labels[:5], shard=shard)
    with pytest.raises(ValueError, match=r"logits \(6, 37\) and ref_logits \(6, 36\)"):
        measure(logits, labels, shard=shard, ref_logits=ref[:, :36])
    with pytest.raises(ValueError, match=r"logits \(6, 37\).*38 columns"):
        measure(logits, labels, shard=VocabShard.whole(38))
