"""Surrogates against numbers worked out by hand, closed-form gradients, and each other at ratio 1."""

import math

import pytest
import torch
from torch import Tensor

from megatron_klrl.config.algorithm import Surrogate as SurrogateName
from megatron_klrl.config.bounds import CLIPS
from megatron_klrl.rl.aggregation import sequence_mean
from megatron_klrl.rl.surrogates import SURROGATES, SurrogateTerms, cispo, gspo, ppo_clip, reinforce
from megatron_klrl.rl.surrogates.terms import Surrogate

RATIOS = [0.5, 0.9, 1.2, 1.5, 4.0]
INF, NAN = float("inf"), float("nan")
ROUNDING = {"rtol": 1e-12, "atol": 1e-14}
"""Everything here is float64."""


def of_ratios(ratios: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities before and after with these ratios, and the mask that counts them all."""
    old = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)[None]
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    return logprobs, old, torch.ones(1, len(ratios), dtype=torch.bool)


def checked(found: SurrogateTerms, logprobs: Tensor, *, values: list, slopes: list, clipped: list) -> None:
    """Values, gradients in the log-probabilities, and which tokens are clipped."""
    (gradient,) = torch.autograd.grad(found.values.sum(), logprobs)
    torch.testing.assert_close(found.values.detach(), torch.tensor(values, dtype=torch.float64), **ROUNDING)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), **ROUNDING)
    assert found.clipped.tolist() == clipped


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "values", "slopes", "clipped"),
    [
        (2.0, None, [1.0, 1.8, 2.4, 2.6, 2.6], [1.0, 1.8, 2.4, 0, 0], [0, 0, 0, 1, 1]),
        (2.0, 3.0, [1.0, 1.8, 2.4, 2.6, 2.6], [1.0, 1.8, 2.4, 0, 0], [0, 0, 0, 1, 1]),
        (-2.0, None, [-1.6, -1.8, -2.4, -3.0, -8.0], [0, -1.8, -2.4, -3.0, -8.0], [1, 0, 0, 0, 0]),
        (-2.0, 3.0, [-1.6, -1.8, -2.4, -3.0, -6.0], [0, -1.8, -2.4, -3.0, 0], [1, 0, 0, 0, 1]),
        (0.0, 3.0, [0.0] * 5, [0.0] * 5, [0] * 5),
    ],
)
def test_ppo_clip_by_hand(advantage: float, dual_clip: float | None, values: list, slopes: list, clipped: list) -> None:
    """Ratios .5 .9 1.2 1.5 4 with the bounds .8 and 1.3."""
    logprobs, old, mask = of_ratios(RATIOS)
    found = ppo_clip(
        logprobs,
        old,
        advantages=torch.full_like(old, advantage),
        mask=mask,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    checked(found, logprobs, values=[values], slopes=[slopes], clipped=[[bool(c) for c in clipped]])


@pytest.mark.parametrize("dual_clip", [None, 1.7])
def test_ppo_clip_is_the_minimum_of_the_paper(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand((8, 50), generator=generator, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn((8, 50), generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn((8, 50), generator=generator, dtype=torch.float64)
    ratios = (logprobs - old).exp()
    expected = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.3) * advantages)
    if dual_clip is not None:
        expected = torch.where(advantages < 0, torch.maximum(expected, dual_clip * advantages), expected)
    found = ppo_clip(
        logprobs,
        old,
        advantages=advantages,
        mask=torch.ones_like(old, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    torch.testing.assert_close(found.values, expected, **ROUNDING)
    (gradient,) = torch.autograd.grad(found.values.sum(), logprobs, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), logprobs)
    torch.testing.assert_close(gradient, wanted, **ROUNDING)
    assert torch.equal(found.clipped, wanted == 0), "clipped is exactly where the gradient is gone"
    assert 0.1 < found.clipped.double().mean() < 0.9


@pytest.mark.parametrize(
    ("advantage", "weights", "clipped"),
    [(2.0, [0.6, 0.9, 1.2, 1.4, 1.4], [1, 0, 0, 1, 1]), (-1.0, [0.6, 0.9, 1.2, 1.4, 1.4], [1, 0, 0, 1, 1])],
)
def test_cispo_by_hand(advantage: float, weights: list[float], clipped: list[int]) -> None:
    """Bounds .6 and 1.4 on the weight, whatever the sign; the gradient never vanishes."""
    logprobs, old, mask = of_ratios(RATIOS)
    found = cispo(logprobs, old, advantages=torch.full_like(old, advantage), mask=mask, clip_low=0.4, clip_high=0.4)
    taken = logprobs.detach()[0].tolist()
    checked(
        found,
        logprobs,
        values=[[w * advantage * lp for w, lp in zip(weights, taken, strict=True)]],
        slopes=[[w * advantage for w in weights]],
        clipped=[[bool(c) for c in clipped]],
    )


def test_reinforce_by_hand() -> None:
    logprobs, old, mask = of_ratios(RATIOS)
    found = reinforce(logprobs, old, advantages=torch.full_like(old, -1.5), mask=mask)
    values = [[-1.5 * lp for lp in logprobs.detach()[0].tolist()]]
    checked(found, logprobs, values=values, slopes=[[-1.5] * 5], clipped=[[False] * 5])


GSPO_LOG_RATIOS = [[0.2, -0.1, NAN, NAN], [0.3, 0.1, 0.2, NAN], [-0.4, 0.0, -0.2, -0.2], [-0.6, -0.2, NAN, NAN]]
GSPO_ADVANTAGES = [2.0, 2.0, -1.0, 1.0]


def gspo_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four sequences of 2, 3, 4 and 2 tokens whose mean log-ratios are .05, .2, -.2 and -.4."""
    log_ratios = torch.tensor(GSPO_LOG_RATIOS, dtype=torch.float64)
    mask = ~log_ratios.isnan()
    old = torch.full_like(log_ratios, -1.0)
    advantages = torch.tensor(GSPO_ADVANTAGES, dtype=torch.float64)[:, None].expand(4, 4)
    return (old + log_ratios).requires_grad_(), old, mask, advantages


def test_gspo_by_hand() -> None:
    """Bounds .9 and 1.1: e^.2 is clipped with A > 0, e^-.2 with A < 0; e^.05 and e^-.4 with A > 0 are not."""
    logprobs, old, mask, advantages = gspo_rows()
    found = gspo(logprobs, old, advantages=advantages, mask=mask, clip_low=0.1, clip_high=0.1)
    first, last = 2 * math.exp(0.05), math.exp(-0.4)
    checked(
        found,
        logprobs,
        values=[[first, first, 0, 0], [2.2, 2.2, 2.2, 0], [-0.9] * 4, [last, last, 0, 0]],
        slopes=[[first, first, 0, 0], [0] * 4, [0] * 4, [last, last, 0, 0]],
        clipped=[[False] * 4, [True, True, True, False], [True] * 4, [False] * 4],
    )


def test_gspo_with_sequence_mean_is_the_papers_objective() -> None:
    """Value and gradient of 1/G sum_i min(s_i A_i, clip(s_i) A_i), s_i differentiated through its own definition."""
    logprobs, old, mask, advantages = gspo_rows()
    found = gspo(logprobs, old, advantages=advantages, mask=mask, clip_low=0.1, clip_high=0.1)
    ours = (sequence_mean(mask).double() * found.values).sum()
    log_ratios = (logprobs - old).where(mask, 0.0)
    s = (log_ratios.sum(-1) / mask.sum(-1)).exp()
    paper = torch.minimum(s * advantages[:, 0], s.clamp(0.9, 1.1) * advantages[:, 0]).mean()
    # aggregation weights are float32
    torch.testing.assert_close(ours, paper, rtol=1e-7, atol=0)
    (gradient,) = torch.autograd.grad(ours, logprobs, retain_graph=True)
    (wanted,) = torch.autograd.grad(paper, logprobs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-12)


def test_gspo_of_the_paper_has_one_over_length_of_reinforce_on_policy() -> None:
    logprobs, _, mask, advantages = gspo_rows()
    found = gspo(logprobs, logprobs.detach(), advantages=advantages, mask=mask, clip_low=3e-4, clip_high=4e-4)
    plain = reinforce(logprobs, logprobs.detach(), advantages=advantages, mask=mask)
    (ours,) = torch.autograd.grad((sequence_mean(mask).double() * found.values).sum(), logprobs)
    (theirs,) = torch.autograd.grad(plain.values.sum() / 4, logprobs)
    torch.testing.assert_close(ours, theirs / mask.sum(-1, keepdim=True), rtol=1e-7, atol=1e-12)


def with_defaults(name: str) -> Surrogate:
    return SURROGATES[name].bounded(**CLIPS[SurrogateName(name)])


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_every_surrogate_has_reinforces_gradient(name: str) -> None:
    """Exactly: at ratio 1 nothing is rounded."""
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand((6, 9), generator=generator).requires_grad_()
    mask = torch.rand((6, 9), generator=generator) < 0.7
    advantages = torch.randn((6, 9), generator=generator)
    found = with_defaults(name).terms(logprobs, logprobs.detach(), advantages=advantages, mask=mask)
    (gradient,) = torch.autograd.grad(found.values.sum(), logprobs)
    assert torch.equal(gradient, advantages.where(mask, 0.0))
    assert not found.clipped.any()


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
def test_masked_tokens_carry_neither_value_nor_gradient(name: str, rubbish: float) -> None:
    logprobs = torch.tensor([[-1.0, rubbish, -2.0], [rubbish] * 3], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3])
    old = torch.tensor([[-1.1, 5.0, -1.9], [0.0, rubbish, rubbish]])
    found = with_defaults(name).terms(logprobs, old, advantages=torch.ones(2, 3), mask=mask)
    (gradient,) = torch.autograd.grad(found.values.sum(), logprobs)
    for tensor in (found.values.detach(), gradient):
        assert torch.isfinite(tensor).all()
        assert (tensor[~mask] == 0).all()
        assert (tensor[mask] != 0).any()
    assert not found.clipped[~mask].any()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo"])
def test_a_clipped_ratio_may_overflow(name: str) -> None:
    """exp(200) is infinite in float32; where it is clipped away it must not come back as 0 * inf."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = with_defaults(name).terms(logprobs, torch.tensor([[-201.0]]), advantages=torch.ones(1, 1), mask=mask)
    (gradient,) = torch.autograd.grad(found.values.sum(), logprobs)
    assert found.clipped.all()
    assert torch.isfinite(found.values).all()
    assert gradient.item() == (5.0 if name == "cispo" else 0.0)


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo"])
def test_a_broken_log_probability_is_not_hidden(name: str) -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = with_defaults(name).terms(
        torch.tensor([[NAN, -1.0]]), torch.full((1, 2), -1.0), advantages=torch.ones(1, 2), mask=mask
    )
    assert found.values.isnan().any()


def test_ppo_clip_is_the_policy_gradient_off_policy_for_one_token() -> None:
    """Unclipped, over every token of the old policy: the current policy's own gradient of E[R]. Reinforce's is not."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(torch.tensor([0.0, 0.4, -0.3], dtype=torch.float64), 0)
    reward = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64)
    (exact,) = torch.autograd.grad((torch.softmax(theta, 0) * reward).sum(), theta)
    inputs = {"advantages": reward[:, None], "mask": torch.ones(3, 1, dtype=torch.bool)}
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    for function, bounds, unbiased in ((ppo_clip, wide, True), (cispo, wide, True), (reinforce, {}, False)):
        logprobs = torch.log_softmax(theta, 0)[:, None]
        terms = function(logprobs, old[:, None], **inputs, **bounds).values[:, 0]
        (found,) = torch.autograd.grad((old.exp() * terms).sum(), theta)
        assert torch.allclose(found, exact, **ROUNDING) == unbiased, function.__name__


def test_the_recipe_offers_what_there_is() -> None:
    assert set(SURROGATES) == {choice.value for choice in SurrogateName} == {choice.value for choice in CLIPS}


def test_reinforce_checks_what_it_does_not_use() -> None:
    with pytest.raises(ValueError, match="old_logprobs"):
        reinforce(torch.zeros(1, 2), torch.zeros(1, 3), advantages=torch.zeros(1, 2), mask=torch.ones(1, 2).bool())
