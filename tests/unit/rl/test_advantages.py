"""Advantages and aggregation against numbers worked out by hand, and the KL beside them."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.config.algorithm import Advantage, Aggregation
from megatron_klrl.config.load import load_recipe
from megatron_klrl.loop.update import assemble
from megatron_klrl.rl.advantages import (
    ADVANTAGES,
    dr_grpo,
    grpo,
    reinforce,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)
from megatron_klrl.rl.advantages.grpo import GROUP_STD_EPS
from megatron_klrl.rl.advantages.reinforce_pp import BATCH_STD_EPS
from megatron_klrl.rl.aggregation import AGGREGATIONS
from megatron_klrl.rl.overlong import overlong_penalty
from tests.unit.config.folders import make_recipe


def test_rloo_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 5.0])
    expected = torch.tensor([1.0, -0.5, -0.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(rloo(rewards, group_size=3), expected, rtol=0, atol=0)


def test_dr_grpo_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0, 5.0])
    expected = torch.tensor([0.0, -1.0, 1.0, -1.0, -1.0, 2.0])
    torch.testing.assert_close(dr_grpo(rewards, group_size=3), expected, rtol=0, atol=0)


def test_grpo_by_hand() -> None:
    """Standard deviations 1 and sqrt(3), with two in the denominator of the variance."""
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    deviations = torch.tensor([1.0, 1, 1, 3**0.5, 3**0.5, 3**0.5], dtype=torch.float64) + GROUP_STD_EPS
    expected = torch.tensor([0.0, -1.0, 1.0, -1.0, -1.0, 2.0], dtype=torch.float64) / deviations
    torch.testing.assert_close(grpo(rewards, group_size=3), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1e4])
def test_a_group_of_equal_rewards_has_no_advantages(reward: float) -> None:
    """0.1 three times has a mean that is off by a rounding; what is tiny must not become large."""
    rewards = torch.tensor([reward] * 3 + [0.0, 0.0, 1.0])
    advantages = grpo(rewards, group_size=3)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3:].abs().min() > 0.5, "the other group keeps its own"


THETA = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
REWARD = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64)


def exact_gradient() -> Tensor:
    """Of the expected reward of a three-armed bandit."""
    return torch.autograd.grad((torch.softmax(THETA, 0) * REWARD).sum(), THETA)[0]


def expected_estimate(name: str, group_size: int) -> Tensor:
    """E[sum_i A_i s_i] / G over every group of independent samples."""
    probability = torch.softmax(THETA, 0).detach()
    estimate = torch.zeros(3, dtype=torch.float64)
    for arms in product(range(3), repeat=group_size):
        index = torch.tensor(arms)
        advantages = ADVANTAGES[name](REWARD[index], group_size=group_size)
        logprobs = torch.log_softmax(THETA, 0)[index]
        (gradient,) = torch.autograd.grad((advantages * logprobs).mean(), THETA)
        estimate += probability[index].prod() * gradient
    return estimate


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_rloo_is_the_exact_policy_gradient_in_expectation(group_size: int) -> None:
    torch.testing.assert_close(expected_estimate("rloo", group_size), exact_gradient(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_dr_grpo_is_the_policy_gradient_shortened_by_its_own_share(group_size: int) -> None:
    expected = (1 - 1 / group_size) * exact_gradient()
    torch.testing.assert_close(expected_estimate("dr_grpo", group_size), expected, rtol=1e-12, atol=1e-14)


def test_only_grpo_forgets_the_scale_of_a_prompts_rewards() -> None:
    """Why no beta beside it is a price in units of reward: both prompts weigh the same."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 10.0], dtype=torch.float64)
    small, large = grpo(rewards, group_size=2).view(2, 2)
    torch.testing.assert_close(small, large, rtol=2 * GROUP_STD_EPS, atol=0)
    small, large = dr_grpo(rewards, group_size=2).view(2, 2)
    torch.testing.assert_close(10 * small, large, rtol=0, atol=0)


def test_grpo_of_zero_one_rewards_follows_the_arcsine_of_success() -> None:
    """Large groups, exactly: E[(R - p) / sqrt(p (1 - p)) s] = grad 2 arcsin(sqrt(p)); the group of 400 is near it."""
    logit = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    size, p = 400, torch.sigmoid(logit)
    (limit,) = torch.autograd.grad(2 * torch.asin(torch.sqrt(p)), logit, retain_graph=True)
    wins = torch.arange(size + 1, dtype=torch.float64)
    weights = torch.distributions.Binomial(size, p.detach()).log_prob(wins).exp()
    found = 0.0
    for count, weight in enumerate(weights.tolist()):
        rewards = (torch.arange(size) < count).double()
        scores = rewards - p.detach()
        found += weight * float((grpo(rewards, group_size=size) * scores).mean())
    assert found == pytest.approx(float(limit), rel=5e-3), "off by about 1/G"


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"])
def test_what_has_no_siblings_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="group"):
        ADVANTAGES[name](torch.zeros(4), group_size=1)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize(("rewards", "group_size"), [(torch.zeros(5), 2), (torch.zeros(2, 2), 2), (torch.zeros(4), 0)])
def test_rows_that_fill_no_groups_are_refused(name: str, rewards: Tensor, group_size: int) -> None:
    with pytest.raises(ValueError, match="group"):
        ADVANTAGES[name](rewards, group_size=group_size)


def test_reinforce_is_the_reward() -> None:
    rewards = torch.tensor([1.0, -0.5, 2.0])
    assert torch.equal(reinforce(rewards, group_size=1), rewards)
    assert torch.equal(reinforce(rewards, group_size=3), rewards)


def test_reinforce_is_the_exact_policy_gradient_in_expectation() -> None:
    torch.testing.assert_close(expected_estimate("reinforce", 2), exact_gradient(), rtol=1e-12, atol=1e-14)


def test_reinforce_pp_by_hand() -> None:
    """Mean 2, deviations -2 -1 1 2, variance 10/3 with three in its denominator; groups play no part."""
    rewards = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    deviation = (10 / 3) ** 0.5 + BATCH_STD_EPS
    expected = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64) / deviation
    for size in (1, 2, 4):
        torch.testing.assert_close(reinforce_pp(rewards, group_size=size), expected, rtol=1e-12, atol=0)


def test_reinforce_pp_baseline_by_hand() -> None:
    """Group means .5 and 6: -.5 .5 -2 2, whose variance is 8.5/3."""
    rewards = torch.tensor([0.0, 1.0, 4.0, 8.0], dtype=torch.float64)
    deviation = (8.5 / 3) ** 0.5 + BATCH_STD_EPS
    expected = torch.tensor([-0.5, 0.5, -2.0, 2.0], dtype=torch.float64) / deviation
    torch.testing.assert_close(reinforce_pp_baseline(rewards, group_size=2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_batch_of_equal_rewards_has_no_advantages(name: str) -> None:
    assert ADVANTAGES[name](torch.full((6,), 0.1), group_size=3).tolist() == [0.0] * 6


def test_reinforce_pp_weighs_prompts_alike_where_grpo_does_not() -> None:
    """One factor for the whole batch keeps the direction of the reward's gradient; one per group does not."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 10.0], dtype=torch.float64)
    whole = reinforce_pp_baseline(rewards, group_size=2)
    torch.testing.assert_close(10 * whole[:2], whole[2:], rtol=1e-12, atol=0)


def test_one_row_alone_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        reinforce_pp(torch.ones(1), group_size=1)


def test_the_overlong_penalty_by_hand() -> None:
    """Longest 10, buffer 4: free up to 6 tokens, then a quarter each."""
    found = overlong_penalty(torch.tensor([1, 6, 7, 8, 10]), max_tokens=10, buffer=4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


@pytest.mark.parametrize(("lengths", "buffer"), [([11], 4), ([1], 0), ([1], 11)])
def test_an_impossible_overlong_penalty_is_refused(lengths: list[int], buffer: int) -> None:
    with pytest.raises(ValueError, match="tokens"):
        overlong_penalty(torch.tensor(lengths), max_tokens=10, buffer=buffer)


def test_the_recipe_offers_what_there_is() -> None:
    assert set(ADVANTAGES) == {choice.value for choice in Advantage}


def step_batch() -> tuple[RolloutBatch, TokenScores]:
    """Two groups of two, with log-probabilities that give every token a KL of its own."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [False, True, True]])
    old = -torch.rand((4, 3), generator=generator).where(mask, 0.0)
    ref = -torch.rand((4, 3), generator=generator).where(mask, 0.0)
    batch = RolloutBatch(
        tokens=torch.ones((4, 4), dtype=torch.int64),
        response_mask=mask,
        rollout_logprobs=old,
        rewards=torch.tensor([1.0, 0.0, 3.0, 0.5]),
        truncated=torch.zeros(4, dtype=torch.bool),
        weight_version=torch.zeros(4, dtype=torch.int64),
    )
    return batch, TokenScores(old_logprobs=old, entropy=torch.zeros_like(old), ref_logprobs=ref)


def test_the_advantage_of_the_reward_leaves_the_kl_alone(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    batch, scores = step_batch()
    assembled = {
        name: assemble(batch, scores, load_recipe(recipe, [f"algorithm.advantage={name}"])) for name in ADVANTAGES
    }
    for name, update in assembled.items():
        expected = ADVANTAGES[name](batch.rewards, group_size=2)[:, None].expand(4, 3).where(batch.response_mask, 0.0)
        torch.testing.assert_close(update.advantages, expected, rtol=0, atol=0)
        torch.testing.assert_close(update.kl_advantages, assembled["rloo"].kl_advantages, rtol=0, atol=0)
    assert assembled["rloo"].kl_advantages.abs().sum() > 0
    assert not torch.equal(assembled["grpo"].advantages, assembled["rloo"].advantages)


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


def test_constant_norm_by_hand() -> None:
    """Over 2 sequences and the constant 8, whatever the lengths."""
    expected = torch.tensor([[1 / 16, 1 / 16, 0, 0], [1 / 16, 1 / 16, 1 / 16, 1 / 16]])
    torch.testing.assert_close(AGGREGATIONS["constant_norm"](MASK, norm_length=8), expected, rtol=1e-7, atol=0)


def test_the_recipe_offers_every_aggregation() -> None:
    assert set(AGGREGATIONS) == {choice.value for choice in Aggregation}
