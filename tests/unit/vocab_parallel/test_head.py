"""The three forms of the output layer against one another and against float64; what they keep alive."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import products
from megatron_klrl.vocab_parallel.head import ReferenceHead, fused_loss, measure_hidden
from megatron_klrl.vocab_parallel.measures import TokenMeasures
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.unit.vocab_parallel.oracle import MEASURES, Allocations, expected, weighted

TOKENS, WIDTH, COLUMNS, REAL = 13, 6, 40, 37
SHARD = VocabShard.whole(REAL)
FORMS = ["whole", "chunks of 1", "chunks of 5", "chunks of 100", "fused", "fused unevenly"]


class Problem:
    """Hidden states, output layer, a reference of another width, and what arrives at the measures."""

    def __init__(self, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden, self.weight = draw(tokens, WIDTH).requires_grad_(), draw(COLUMNS, WIDTH).requires_grad_()
        self.reference = ReferenceHead(hidden=draw(tokens, 4), weight=draw(COLUMNS, 4))
        self.labels = torch.randint(0, REAL, (tokens,), generator=generator)
        self.upstream = {name: torch.randn(tokens, generator=generator) for name in MEASURES}

    def oracle(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Value and both gradients in float64; the weight's padding rows get none."""
        hidden, weight = (each.detach().double().requires_grad_() for each in (self.hidden, self.weight))
        ref = self.reference.hidden.double() @ self.reference.weight[:REAL].double().T
        value = weighted(expected(hidden @ weight[:REAL].T, ref, self.labels, temperature=temperature), self.upstream)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    def run(self, form: str, temperature: float = 1.0) -> Tensor:
        """The weighted sum of the measures by one form, times three."""
        arguments = {"shard": SHARD, "temperature": temperature, "reference": self.reference, "entropy": True}
        of_problem = self.hidden, self.weight, self.labels
        if form.startswith("fused"):
            ends = [0, len(self.labels)] if form == "fused" else [0, 4, 4, 5, len(self.labels)]
            chunks = [slice(*pair) for pair in itertools.pairwise(ends)]
            return 3 * fused_loss(*of_problem, loss=self.loss(chunks), chunks=chunks, **arguments)  # type: ignore[arg-type]
        size = None if form == "whole" else int(form.split()[-1])
        return 3 * weighted(measure_hidden(*of_problem, chunk_tokens=size, **arguments), self.upstream)  # type: ignore[arg-type]

    def loss(self, chunks: list[slice]) -> Callable[[TokenMeasures, int], Tensor]:
        """The same sum, chunk by chunk."""
        return lambda found, number: weighted(
            found, {name: value[chunks[number]] for name, value in self.upstream.items()}
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_float64(form: str, temperature: float) -> None:
    """float32 logits of ten are off by 1e-6, and so is all that follows; chunks may not divide the tokens."""
    problem = Problem()
    value, of_hidden, of_weight = problem.oracle(temperature)
    found = problem.run(form, temperature)
    found.backward()
    torch.testing.assert_close(found.detach().double(), 3 * value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(problem.hidden.grad.double(), 3 * of_hidden, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    torch.testing.assert_close(problem.weight.grad.double(), 3 * of_weight, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    assert problem.weight.grad[REAL:].abs().sum() == 0  # type: ignore[index]


@pytest.mark.parametrize("form", FORMS)
def test_bf16(form: str) -> None:
    """Logits are rounded to bf16, by 2**-9 of ten: so are the log-probabilities, and the gradients by 5 %."""
    problem = Problem(dtype=torch.bfloat16)
    _, of_hidden, of_weight = problem.oracle(1.0)
    problem.run(form).backward()
    for grad, right in ((problem.hidden.grad, of_hidden), (problem.weight.grad, of_weight)):
        assert grad is not None
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - 3 * right).norm() / (3 * right).norm()) < 0.05


def test_low_precision_weight_gradient_is_summed_in_float32() -> None:
    """512 equal chunks: a bf16 sum would stop growing after 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.long)
    measure_hidden(hidden, weight, labels, shard=VocabShard.whole(2), chunk_tokens=1).logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]


@pytest.mark.parametrize("form", [*FORMS[:4], "fused"])
def test_no_tokens(form: str) -> None:
    problem = Problem(tokens=0)
    problem.run(form).backward()
    assert problem.hidden.grad is not None
    assert problem.hidden.grad.shape == (0, WIDTH)
    assert problem.weight.grad is not None
    assert problem.weight.grad.abs().sum() == 0


def test_no_chunks_for_no_tokens() -> None:
    problem = Problem(tokens=0)
    loss = fused_loss(problem.hidden, problem.weight, problem.labels, shard=SHARD, loss=problem.loss([]), chunks=[])
    loss.backward()
    assert float(loss.detach()) == 0
    assert problem.weight.grad is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(form: str, frozen: str) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    problem.run(form).backward()
    other = problem.weight if frozen == "hidden" else problem.hidden
    assert getattr(problem, frozen).grad is None
    assert other.grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients(form: str) -> None:
    problem = Problem()
    trained = problem.run(form)
    with torch.no_grad(), Allocations() as record:
        scored = problem.run(form)
    assert not scored.requires_grad
    torch.testing.assert_close(scored, trained.detach(), rtol=1e-6, atol=1e-5)
    policy_products = sum(size == WIDTH for size in record.inner_sizes)
    chunks = {"whole": 1, "chunks of 1": 13, "chunks of 5": 3, "chunks of 100": 1, "fused": 1, "fused unevenly": 4}
    assert policy_products == chunks[form], "one product with the output layer and no other"


def test_number_of_products() -> None:
    """Of the policy: whole and fused three, chunked four (a chunk's logits are made again for the backward)."""
    count = {}
    for form in ("whole", "chunks of 100", "fused"):
        problem = Problem()
        problem.reference = None  # type: ignore[assignment]
        problem.upstream = {"logprobs": problem.upstream["logprobs"]}
        with Allocations() as record:
            problem.run(form).backward()
        count[form] = len(record.inner_sizes)
    assert count == {"whole": 3, "chunks of 100": 4, "fused": 3}


@pytest.mark.parametrize("form", ["chunked", "fused"])
def test_one_chunk_is_alive(form: str) -> None:
    """Beside one buffer for the gradient of the weight, nothing larger than a chunk of logits is ever made."""
    tokens, width, columns, size = 64, 8, 4096, 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(columns, width, requires_grad=True)
    labels = torch.arange(tokens)
    shard = VocabShard.whole(columns)
    chunks = [slice(start, start + size) for start in range(0, tokens, size)]
    with Allocations() as record:
        if form == "fused":
            fused_loss(
                hidden, weight, labels, shard=shard, loss=lambda found, _: found.logprobs.sum(), chunks=chunks
            ).backward()
        else:
            measure_hidden(hidden, weight, labels, shard=shard, chunk_tokens=size).logprobs.sum().backward()
    chunk, of_weight = size * columns * 4, columns * width * 4
    assert of_weight == 2 * chunk
    assert max(record.sizes) == of_weight
    assert sum(each == of_weight for each in record.sizes) == 1
    assert max(each for each in record.sizes if each != of_weight) == chunk


def test_the_reference_of_a_whole_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(products._REFERENCE_BYTES, "cpu", 3 * COLUMNS * 4)
    problem = Problem()
    _, of_hidden, _ = problem.oracle(1.0)
    with Allocations() as record:
        problem.run("whole").backward()
    torch.testing.assert_close(problem.hidden.grad.double(), 3 * of_hidden, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    whole = TOKENS * COLUMNS * 4
    assert sum(size == whole for size in record.sizes) == 1, "the policy's logits alone"


def test_second_backward() -> None:
    for form, match in (("whole", "second"), ("fused", "second")):
        problem = Problem()
        value = problem.run(form)
        value.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=match):
            value.backward()
    problem = Problem()
    value = problem.run("chunks of 5")
    value.backward(retain_graph=True)
    once = problem.hidden.grad.clone()  # type: ignore[union-attr]
    value.backward()
    torch.testing.assert_close(problem.hidden.grad, 2 * once)


def test_a_loss_without_gradient_in_a_chunk() -> None:
    """As of a chunk whose tokens are all masked."""
    problem = Problem()
    chunks = [slice(0, 5), slice(5, TOKENS)]
    fused_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        shard=SHARD,
        loss=lambda found, number: found.logprobs.sum() if number else torch.tensor(7.0),
        chunks=chunks,
    ).backward()
    assert problem.hidden.grad is not None
    assert problem.hidden.grad[:5].abs().sum() == 0
    assert problem.hidden.grad[5:].abs().sum() > 0


def test_what_does_not_fit_is_named() -> None:
    problem = Problem()
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels
    with pytest.raises(ValueError, match=r"hidden \(13, 6\).*labels \(12,\)"):
        measure_hidden(hidden, weight, labels[:12], shard=SHARD)
    with pytest.raises(ValueError, match=r"hidden \(13, 6\) and weight \(40, 5\)"):
        measure_hidden(hidden, weight[:, :5], labels, shard=SHARD)
    with pytest.raises(ValueError, match=r"torch.float32 and weight torch.bfloat16"):
        measure_hidden(hidden, weight.bfloat16(), labels, shard=SHARD)
    with pytest.raises(ValueError, match=r"weight \(36, 6\).*37 columns"):
        measure_hidden(hidden, weight[:36], labels, shard=SHARD)
    short = ReferenceHead(hidden=problem.reference.hidden[:12], weight=problem.reference.weight)
    with pytest.raises(ValueError, match=r"reference.hidden \(12, 4\)"):
        measure_hidden(hidden, weight, labels, shard=SHARD, reference=short)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        measure_hidden(hidden, weight, labels, shard=SHARD, chunk_tokens=0)
    for chunks in ([slice(0, 5)], [slice(0, 5), slice(6, 13)], [slice(0, 8), slice(5, 13)]):
        with pytest.raises(ValueError, match="chunks"):
            fused_loss(hidden, weight, labels, shard=SHARD, loss=problem.loss(chunks), chunks=chunks)
