"""The output layer on tensors of another device than the CPU's: nothing in it is made on the CPU by accident."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.head import ReferenceHead
from megatron_klrl.vocab_parallel.measures import measure
from tests.support.elsewhere import AWAY, elsewhere
from tests.unit.vocab_parallel.oracle import weighted
from tests.unit.vocab_parallel.test_head import FORMS, SHARD, Problem


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._InUse, "kernels", kernels.Kernels.EAGER)


def there(problem: Problem, away: Callable[[Tensor], Tensor]) -> Problem:
    for name in ("hidden", "weight"):
        setattr(problem, name, away(getattr(problem, name).detach()).requires_grad_())
    reference = problem.reference
    problem.reference = ReferenceHead(hidden=away(reference.hidden), weight=away(reference.weight))
    problem.labels = away(problem.labels)
    problem.upstream = {name: away(value) for name, value in problem.upstream.items()}
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_head(form: str, dtype: torch.dtype) -> None:
    here = Problem(dtype=dtype)
    wanted = here.run(form, temperature=0.7)
    wanted.backward()
    with elsewhere() as away:
        other = there(Problem(dtype=dtype), away)
        found = other.run(form, temperature=0.7)
        found.backward()
    assert torch.equal(found.detach().cpu(), wanted.detach())
    for name in ("hidden", "weight"):
        gradient = getattr(other, name).grad
        assert gradient.device == AWAY
        assert torch.equal(gradient.cpu(), getattr(here, name).grad)


@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_that_exist(overwrite: bool) -> None:  # noqa: FBT001  pytest's
    problem = Problem()
    logits = (problem.hidden @ problem.weight.T).detach()
    with elsewhere() as away:
        other = there(Problem(), away)
        far = away(logits.clone()).requires_grad_()
        found = measure(
            far, other.labels, shard=SHARD, ref_logits=away(logits.flip(0)), entropy=True, overwrite=overwrite
        )
        weighted(found, other.upstream).backward()
    near = logits.clone().requires_grad_()
    wanted = measure(near, problem.labels, shard=SHARD, ref_logits=logits.flip(0), entropy=True, overwrite=overwrite)
    weighted(wanted, problem.upstream).backward()
    assert torch.equal(found.logprobs.detach().cpu(), wanted.logprobs.detach())
    assert torch.equal(far.grad.cpu(), near.grad)  # type: ignore[union-attr]
