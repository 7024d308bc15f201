"""The trainer's path (per-token advantages with a group baseline) has the expected gradient of the surrogate."""

import pytest
import torch
from torch import Tensor

from megatron_klrl.kl import KLConfig, Placement, catalogue, loss_terms, reward_advantages
from megatron_klrl.kl.exact import Space, response_probs, token_kl, token_logprobs
from megatron_klrl.kl.measure import Problem, chained, row_gradients
from megatron_klrl.kl.surrogate import leave_one_out_baseline, reward_coefficients
from tests.unit.kl.problems import random_problem, small_space

_REWARD_SIDE = [entry.config for entry in catalogue() if entry.config.placement is not Placement.LOSS]
_TOLERANCE = 1e-12


def _all_groups(space: Space, policy: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """Every group of independent responses to one prompt: rows ``[M, G]`` and probabilities ``[M]``."""
    probs = response_probs(space, policy) * space.num_prompts
    rows = []
    for prompt in range(space.num_prompts):
        members = (space.prompts == prompt).nonzero().flatten()
        rows.append(torch.cartesian_prod(*[members] * group_size))
    groups = torch.cat(rows)
    return groups, probs[groups].prod(-1) / space.num_prompts


def _trainer_gradient(problem: Problem, config: KLConfig, *, group_size: int) -> Tensor:
    """Expectation over groups of the gradient of ``(loss_terms - advantages * logprobs).sum(-1).mean()``."""
    space = problem.space
    groups, probs = _all_groups(space, problem.rollout, group_size=group_size)
    rows = groups.flatten()
    columns = {
        "logprobs": token_logprobs(space, problem.policy)[rows],
        "ref_logprobs": token_logprobs(space, problem.reference)[rows],
        "mask": space.mask[rows],
        "rollout_logprobs": token_logprobs(space, problem.rollout)[rows],
        "full_kl": token_kl(space, problem.policy, problem.reference)[rows],
    }
    logprobs, full_kl = (columns[name].detach().requires_grad_() for name in ("logprobs", "full_kl"))
    columns |= {"logprobs": logprobs, "full_kl": full_kl}
    advantages = reward_advantages(**columns, config=config, group_size=group_size)
    losses = (loss_terms(**columns, config=config) - advantages * logprobs).sum(-1)
    weights = probs.repeat_interleave(group_size) / group_size
    slopes = Problem(
        space=space,
        policy=problem.policy,
        reference=problem.reference,
        rollout=problem.rollout,
        logprob_slopes=problem.logprob_slopes[rows],
        kl_slopes=problem.kl_slopes[rows],
    )
    return weights @ chained(slopes, losses.sum(), logprobs=logprobs, full_kl=full_kl)


@pytest.mark.parametrize("config", _REWARD_SIDE, ids=lambda config: config.name)
def test_on_policy_the_trainer_follows_the_surrogate(config):
    problem = random_problem(small_space(), on_policy=True)
    expected = problem.expected(row_gradients(problem, config))

    torch.testing.assert_close(
        _trainer_gradient(problem, config, group_size=2), expected, rtol=_TOLERANCE, atol=_TOLERANCE
    )


@pytest.mark.parametrize(
    "config", [config for config in _REWARD_SIDE if config.correction != "none"], ids=lambda config: config.name
)
def test_off_policy_the_baseline_carries_the_ratio_of_the_correction(config):
    problem = random_problem(small_space(), on_policy=False)
    expected = problem.expected(row_gradients(problem, config))

    torch.testing.assert_close(
        _trainer_gradient(problem, config, group_size=2), expected, rtol=_TOLERANCE, atol=_TOLERANCE
    )


@pytest.mark.parametrize("name", ["sequence", "to_go"])
def test_groups_of_three_are_unbiased_too(name):
    problem = random_problem(small_space(num_prompts=1), on_policy=False)
    config = KLConfig(beta=1.0, credit=name, correction="sequence")
    expected = problem.expected(row_gradients(problem, config))

    torch.testing.assert_close(
        _trainer_gradient(problem, config, group_size=3), expected, rtol=_TOLERANCE, atol=_TOLERANCE
    )


def test_off_policy_a_baseline_without_a_correction_shifts_the_expectation():
    problem = random_problem(small_space(), on_policy=False)
    config = KLConfig(beta=1.0)
    expected = problem.expected(row_gradients(problem, config))

    assert float((_trainer_gradient(problem, config, group_size=2) - expected).norm()) > 1e-3


def test_advantages_of_a_group_by_hand():
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [-2.0, -1.0]])
    ref_logprobs = torch.zeros(3, 2)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    config = KLConfig(beta=0.5, credit="sequence")

    advantages = reward_advantages(logprobs, ref_logprobs, mask, config=config, group_size=3)

    # K1 = -2, -1, -3; mean of the others -2, -2.5, -1.5; advantage beta * (others - own)
    assert advantages.tolist() == [[0.0, 0.0], [-0.75, 0.0], [0.75, 0.75]]


def test_credit_to_go_compares_the_same_columns():
    logprobs = torch.tensor([[-1.0, -4.0], [-2.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])

    advantages = reward_advantages(logprobs, torch.zeros(2, 2), mask, config=KLConfig(beta=1.0), group_size=2)

    # to go: -5, -4 and -2 (ended: 0)
    assert advantages.tolist() == [[3.0, 4.0], [-3.0, 0.0]]


@pytest.mark.parametrize("config", _REWARD_SIDE, ids=lambda config: config.name)
def test_a_group_of_one_has_no_baseline(config):
    space = small_space()
    problem = random_problem(space, on_policy=False)
    arguments = {
        "logprobs": token_logprobs(space, problem.policy),
        "ref_logprobs": token_logprobs(space, problem.reference),
        "mask": space.mask,
        "rollout_logprobs": token_logprobs(space, problem.rollout),
        "full_kl": token_kl(space, problem.policy, problem.reference),
        "config": config,
    }

    assert torch.equal(reward_advantages(**arguments, group_size=1), -reward_coefficients(**arguments))


def test_the_loss_side_has_no_advantages():
    config = KLConfig(estimator="k3", placement="loss", credit="token")
    logprobs = -torch.ones(4, 3)

    advantages = reward_advantages(
        logprobs, torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool), config=config, group_size=2
    )

    assert torch.equal(advantages, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("group_size", "message"), [(3, "4 sequences are not a whole number of groups of 3"), (0, "at least 1")]
)
@pytest.mark.parametrize(("placement", "credit"), [("reward", "to_go"), ("loss", "token")])
def test_incomplete_groups_are_refused(group_size, message, placement, credit):
    config = KLConfig(placement=placement, credit=credit)

    with pytest.raises(ValueError, match=message):
        reward_advantages(
            torch.zeros(4, 3),
            torch.zeros(4, 3),
            torch.ones(4, 3, dtype=torch.bool),
            config=config,
            group_size=group_size,
        )


def test_leave_one_out_is_the_mean_of_the_others():
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 30.0])

    assert leave_one_out_baseline(values, group_size=3).tolist() == [4.0, 3.5, 1.5, 25.0, 20.0, 15.0]
    assert leave_one_out_baseline(values, group_size=1).tolist() == [0.0] * 6
