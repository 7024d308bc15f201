"""Advantages and aggregation against numbers worked out by hand."""

import pytest
import torch

from megatron_klrl.rl.advantages import rloo
from megatron_klrl.rl.aggregation import AGGREGATIONS


def test_rloo_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 5.0])
    expected = torch.tensor([1.0, -0.5, -0.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(rloo(rewards, group_size=3), expected, rtol=0, atol=0)


def test_rloo_is_the_exact_policy_gradient_in_expectation() -> None:
    """Enumerated: two samples of a three-armed bandit; E[sum_i A_i s_i] / G equals grad E[R]."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64)
    probability = torch.softmax(theta, 0)
    (exact,) = torch.autograd.grad((probability * reward).sum(), theta, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            advantages = rloo(torch.stack([reward[a], reward[b]]), group_size=2)
            logprobs = torch.log_softmax(theta, 0)[torch.tensor([a, b])]
            (gradient,) = torch.autograd.grad((advantages * logprobs).mean(), theta, retain_graph=True)
            estimate += (probability[a] * probability[b]).detach() * gradient
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("rewards", "group_size"), [(torch.zeros(4), 1), (torch.zeros(5), 2), (torch.zeros(2, 2), 2)])
def test_rloo_refuses_what_has_no_baseline(rewards: torch.Tensor, group_size: int) -> None:
    with pytest.raises(ValueError, match="group"):
        rloo(rewards, group_size=group_size)


MASK = torch.tensor([[True, True, False, False], [True, True, True, True]])


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sequence_sum", [[0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, 0.5]]),
        ("sequence_mean", [[0.25, 0.25, 0, 0], [0.125, 0.125, 0.125, 0.125]]),
        ("token_mean", [[1 / 6, 1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6, 1 / 6]]),
    ],
)
def test_aggregation_by_hand(name: str, weights: list[list[float]]) -> None:
    torch.testing.assert_close(AGGREGATIONS[name](MASK), torch.tensor(weights), rtol=1e-7, atol=0)
