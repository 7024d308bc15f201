"""The oracle itself: against finite differences, the chain rule of the KL, and the closed-form optimum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_klrl.kl import exact
from megatron_klrl.kl.exact import Sharing, Space
from tests.unit.kl.problems import random_parameters, small_space

_STEP = 1e-5
_FINITE_DIFFERENCE = 1e-9  # central differences in float64: step^2 + rounding / step


def _finite_difference(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    units = torch.eye(at.shape[0], dtype=at.dtype) * _STEP
    return torch.stack([(value(at + unit) - value(at - unit)) / (2 * _STEP) for unit in units])


def _parameters(space: Space) -> tuple[Tensor, Tensor, Tensor]:
    return random_parameters(space, seed=0), random_parameters(space, seed=1), random_parameters(space, seed=2)


@pytest.mark.parametrize("sharing", Sharing)
def test_responses_are_all_there_is(sharing):
    space = exact.build_space(num_prompts=3, vocab_size=3, max_tokens=4, sharing=sharing)
    policy, _, _ = _parameters(space)

    assert space.tokens.shape[0] == 3 * (1 + 2 + 4 + 8 + 16)
    assert float(exact.response_probs(space, policy).sum()) == pytest.approx(1.0, abs=1e-12)
    rows = {(int(p), *row[m].tolist()) for p, row, m in zip(space.prompts, space.tokens, space.mask, strict=True)}
    assert len(rows) == space.tokens.shape[0]


def test_masks_are_ragged_on_both_sides_and_hold_the_end_token():
    space = small_space()

    first = space.mask.int().argmax(-1)
    assert first.tolist() == (space.prompts + 1).tolist()
    ended = [row[mask].tolist() for row, mask in zip(space.tokens, space.mask, strict=True)]
    assert all(exact.END in response or len(response) == 2 for response in ended)
    assert [0] in ended


def test_parameters_are_shared_or_not():
    assert small_space(sharing=Sharing.SHARED).num_parameters == 3 * (2 + 3 + 2 + 1)
    assert small_space(sharing=Sharing.TABULAR).num_parameters == 3 * 6


def test_sequence_kl_is_the_visited_token_kl():
    space = small_space()
    policy, reference, _ = _parameters(space)

    visited = (exact.response_probs(space, policy) * exact.token_kl(space, policy, reference).sum(-1)).sum()

    assert float(exact.sequence_kl(space, policy, reference)) == pytest.approx(float(visited), abs=1e-13)
    assert float(exact.sequence_kl(space, policy, policy)) == 0.0


def test_gradients_agree_with_finite_differences():
    space = small_space()
    policy, reference, other = _parameters(space)
    visits = exact.response_probs(space, other)

    def close(gradient: Tensor, value: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(gradient, _finite_difference(value, policy), rtol=0, atol=_FINITE_DIFFERENCE)

    close(exact.sequence_kl_gradient(space, policy, reference), lambda p: exact.sequence_kl(space, p, reference))
    close(exact.rollout_kl_gradient(space, policy, other), lambda p: exact.sequence_kl(space, other, p))
    close(
        exact.token_kl_gradient(space, policy, reference, prefixes=other),
        lambda p: (visits * exact.token_kl(space, p, reference).sum(-1)).sum(),
    )
    close(
        exact.forward_token_kl_gradient(space, policy, reference, prefixes=other),
        lambda p: (visits * exact.token_kl(space, reference, p).sum(-1)).sum(),
    )


def test_the_optimum_is_stationary_and_its_value_is_beta_log_z():
    space, beta = small_space(sharing=Sharing.TABULAR), 0.3
    _, reference, _ = _parameters(space)
    rewards = torch.rand(space.tokens.shape[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    probs = exact.optimal_probs(space, reference, rewards, beta=beta)
    parameters = _tabular_parameters(space, probs).requires_grad_()

    value = exact.objective(space, parameters, reference, rewards, beta=beta)
    (gradient,) = torch.autograd.grad(value, parameters)

    torch.testing.assert_close(exact.response_probs(space, parameters), probs, rtol=0, atol=1e-12)
    assert float(gradient.abs().max()) < 1e-12
    weights = exact.response_probs(space, reference) * torch.exp(rewards / beta) * space.num_prompts
    partitions = [weights[space.prompts == prompt].sum().log() for prompt in range(space.num_prompts)]
    assert float(value.detach()) == pytest.approx(beta * float(sum(partitions)) / space.num_prompts, abs=1e-12)


def _tabular_parameters(space: Space, probs: Tensor) -> Tensor:
    """Logits of the tabular policy that gives these response probabilities: log of the mass behind each next token."""
    mass = torch.zeros(space.design.shape[:2], dtype=torch.float64)
    for row in range(probs.shape[0]):
        for column in space.mask[row].nonzero().flatten():
            mass[space.states[row, column], space.tokens[row, column]] += probs[row]
    return mass.log().flatten()
