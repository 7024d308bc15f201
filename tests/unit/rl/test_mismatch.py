"""Mismatch weights by hand, and by enumeration what each correction corrects."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_klrl.config.algorithm import MismatchCorrection
from megatron_klrl.config.bounds import WEIGHT_RANGES
from megatron_klrl.metrics.weights import effective_share
from megatron_klrl.rl.mismatch import (
    CORRECTIONS,
    Action,
    MismatchWeights,
    prefix_truncate,
    sequence_mask,
    sequence_truncate,
    token_mask,
    token_truncate,
)

NAN = float("nan")
WEIGHTS = [[4.0, 0.25, NAN], [1.5, 2.0, 1.0], [0.5, 0.5, 1.0], [NAN, NAN, NAN]]
"""Of tokens; products 1, 3 and .25, and a sequence without a response."""


def given() -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    rollout = torch.full_like(weights, -2.0).requires_grad_()
    return rollout + weights.log(), rollout, ~weights.isnan()


def share_of(found: MismatchWeights) -> float:
    return effective_share(found.values[found.counted])


def check(found: MismatchWeights, mask: Tensor, *, weights: list, fraction: float, share: float) -> None:
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(found.per_token(mask), expected, rtol=1e-12, atol=0)
    assert not found.values.requires_grad
    assert found.bounded_fraction() == pytest.approx(fraction, rel=1e-6)
    assert share_of(found) == pytest.approx(share, rel=1e-12)


def test_token_truncate_by_hand() -> None:
    old, rollout, mask = given()
    found = token_truncate(old, rollout, mask=mask, high=2.0)
    kept = [2, 0.25, 1.5, 2, 1, 0.5, 0.5, 1]
    check(
        found,
        mask,
        weights=[[2, 0.25, 1], [1.5, 2, 1], [0.5, 0.5, 1], [1, 1, 1]],
        fraction=1 / 8,
        share=sum(kept) ** 2 / (8 * sum(w * w for w in kept)),
    )
    assert found.action is Action.TRUNCATED


def test_token_mask_by_hand() -> None:
    old, rollout, mask = given()
    found = token_mask(old, rollout, mask=mask, low=0.4, high=1.9)
    kept = [1.5, 1, 0.5, 0.5, 1]
    check(
        found,
        mask,
        weights=[[0, 0, 1], [1.5, 0, 1], [0.5, 0.5, 1], [1, 1, 1]],
        fraction=3 / 8,
        share=sum(kept) ** 2 / (8 * sum(w * w for w in kept)),
    )
    assert found.action is Action.MASKED


def test_prefix_truncate_by_hand() -> None:
    """Products so far: 4 1, 1.5 3 3, .5 .25 .25."""
    old, rollout, mask = given()
    found = prefix_truncate(old, rollout, mask=mask, high=2.0)
    kept = [2, 1, 1.5, 2, 2, 0.5, 0.25, 0.25]
    check(
        found,
        mask,
        weights=[[2, 1, 1], [1.5, 2, 2], [0.5, 0.25, 0.25], [1, 1, 1]],
        fraction=3 / 8,
        share=sum(kept) ** 2 / (8 * sum(w * w for w in kept)),
    )
    assert found.action is Action.TRUNCATED


def test_sequence_truncate_by_hand() -> None:
    """Products 1, 3 and .25; the row without a response counts nowhere."""
    old, rollout, mask = given()
    found = sequence_truncate(old, rollout, mask=mask, high=2.0)
    check(
        found,
        mask,
        weights=[[1, 1, 1], [2, 2, 2], [0.25, 0.25, 0.25], [1, 1, 1]],
        fraction=1 / 3,
        share=3.25**2 / (3 * (1 + 4 + 1 / 16)),
    )


def test_sequence_mask_by_hand() -> None:
    old, rollout, mask = given()
    found = sequence_mask(old, rollout, mask=mask, low=0.3, high=4.0)
    check(
        found,
        mask,
        weights=[[1, 1, 1], [3, 3, 3], [0, 0, 0], [1, 1, 1]],
        fraction=1 / 3,
        share=16 / (3 * 10),
    )


def test_the_effective_share_of_equal_weights_is_one_and_of_none_zero() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    same = torch.full((2, 3), -1.0)
    assert share_of(token_truncate(same, same, mask=mask, high=2.0)) == 1.0
    assert share_of(token_mask(same + 3, same, mask=mask, low=0.5, high=2.0)) == 0.0
    nothing = token_truncate(same, same, mask=torch.zeros_like(mask), high=2.0)
    assert (nothing.bounded_fraction(), share_of(nothing)) == (0.0, 0.0)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_overflows_is_bounded_and_what_is_broken_is_not_hidden(name: str) -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    bounds = WEIGHT_RANGES[MismatchCorrection(name)]
    rollout = torch.tensor([[-500.0, -1.0], [NAN, -1.0]])
    found = CORRECTIONS[name](torch.full((2, 2), -1.0), rollout, mask=mask, **bounds).per_token(mask)
    assert torch.isfinite(found[0]).all()
    assert found[1].isnan().any()


REWARD = torch.tensor([[1.0, 0.2], [-0.5, 0.8]], dtype=torch.float64)
"""Of the four responses of two tokens."""


def expected_gradient(sampler: Tensor, theta: Tensor, weights: Tensor) -> Tensor:
    """E over the sampler of w R grad log pi, by enumeration.

    Args:
        sampler: ``[3, 2]`` logits of the first token, and of the second after either.
        theta: the same of the policy.
        weights: ``[4, 2]`` of each response's tokens.
    """
    logprobs, sampled = of_responses(theta), of_responses(sampler).detach()
    terms = (weights * logprobs).sum(-1) * REWARD.flatten()
    return torch.autograd.grad((sampled.sum(-1).exp() * terms).sum(), theta)[0]


def of_responses(logits: Tensor) -> Tensor:
    table = torch.log_softmax(logits, -1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in product(range(2), repeat=2)])


def test_only_the_product_over_the_sequence_corrects_the_gradient() -> None:
    """Without a bound that acts: Seq-IS is exact, token-IS leaves the prefix out, no correction leaves out all."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn((3, 2), generator=generator, dtype=torch.float64).requires_grad_()
    sampler = theta.detach() + 0.5 * torch.randn((3, 2), generator=generator, dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    exact = expected_gradient(theta.detach(), theta, torch.ones(4, 2, dtype=torch.float64))

    def error(weights: Tensor) -> float:
        return float((expected_gradient(sampler, theta, weights) - exact).norm() / exact.norm())

    old, rollout = of_responses(theta).detach(), of_responses(sampler)
    of_sequence = sequence_truncate(old, rollout, mask=mask, high=math.inf).per_token(mask)
    of_token = token_truncate(old, rollout, mask=mask, high=math.inf).per_token(mask)
    assert error(of_sequence) < 1e-12
    assert error(of_token) > 0.01
    assert error(torch.ones(4, 2, dtype=torch.float64)) > 0.01


def test_the_recipe_offers_what_there_is() -> None:
    assert {"none", *CORRECTIONS} == {choice.value for choice in MismatchCorrection}
    assert set(WEIGHT_RANGES) == set(MismatchCorrection)
