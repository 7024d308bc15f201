"""Where training ends: exact expected gradients, full-batch ascent of E[R] - beta * (what the configuration applies).

A tabular policy can represent the optimum ref * exp(R / beta) / Z. Steps are preconditioned with the exact Fisher
matrix: that leaves the stationary points where they are and reaches them in tens of steps instead of thousands.
"""

import pytest
import torch
from torch import Tensor

from megatron_klrl.kl import KLConfig
from megatron_klrl.kl.estimators import KLOverflowError
from megatron_klrl.kl.exact import Sharing, Space, objective, optimal_probs, response_probs, sequence_kl
from megatron_klrl.kl.measure import build_problem, row_gradients
from tests.unit.kl.problems import random_parameters, small_space

_BETA = 0.5
_STEPS = 60


def _setting() -> tuple[Space, Tensor, Tensor]:
    space = small_space(sharing=Sharing.TABULAR)
    rewards = torch.rand(space.tokens.shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return space, random_parameters(space, seed=0), rewards


def _config(name: str, beta: float = _BETA) -> KLConfig:
    placement, estimator, credit, correction = name.split("/")
    return KLConfig(placement=placement, estimator=estimator, credit=credit, correction=correction, beta=beta)


def _trained(config: KLConfig, *, steps: int = _STEPS, start: Tensor | None = None, with_reward: bool = True) -> Tensor:
    space, reference, rewards = _setting()
    parameters = reference.clone() if start is None else start.clone()
    for _ in range(steps):
        problem = build_problem(space, policy=parameters, reference=reference, rollout=parameters)
        scores = problem.logprob_slopes.sum(1)
        step = -problem.expected(row_gradients(problem, config))
        if with_reward:
            step = step + problem.expected(rewards[:, None] * scores)
        fisher = torch.einsum("n,np,nq->pq", problem.probs(), scores, scores)
        parameters = parameters + 0.5 / _BETA * torch.linalg.pinv(fisher, hermitian=True) @ step
    return parameters


def _distance_to_optimum(parameters: Tensor) -> float:
    """Total variation to the closed-form optimum."""
    space, reference, rewards = _setting()
    optimum = optimal_probs(space, reference, rewards, beta=_BETA)
    return float((response_probs(space, parameters) - optimum).abs().sum() / 2)


@pytest.mark.parametrize(
    "name",
    [
        "reward/k1/sequence/none",
        "reward/k1/to_go/none",
        "loss/k2/sequence/none",
        "both/k1/to_go/none",
        "both/k3/sequence/none",
        "both/k3/to_go/none",
        "loss/k1/to_go/prefix",
        "loss/k3/to_go/prefix",
        "loss/exact/to_go/prefix",
        "both/exact/sequence/none",
        "both/exact/to_go/none",
    ],
)
def test_unbiased_configurations_end_at_the_optimum(name):
    assert _distance_to_optimum(_trained(_config(name))) < 1e-8


@pytest.mark.parametrize(
    "name",
    [
        "reward/k1/token/none",
        "loss/k2/token/none",
        "loss/k3/token/none",
        "loss/k3/token/token",
        "loss/exact/token/none",
        "both/k2/to_go/none",
    ],
)
def test_biased_configurations_end_elsewhere_and_lower(name):
    space, reference, rewards = _setting()
    ended = _trained(_config(name))
    best = _trained(_config("reward/k1/to_go/none"))

    assert _distance_to_optimum(ended) > 0.003
    gap = objective(space, best, reference, rewards, beta=_BETA) - objective(
        space, ended, reference, rewards, beta=_BETA
    )
    assert float(gap) > 1e-5


def test_k1_in_the_loss_trains_as_if_beta_were_zero():
    with_kl = _trained(_config("loss/k1/token/none"), steps=10)
    without = _trained(KLConfig(beta=0.0), steps=10)

    torch.testing.assert_close(with_kl, without, rtol=0, atol=1e-8)
    assert _distance_to_optimum(with_kl) > 0.1


def test_token_level_k2_regularises_less_than_stated():
    space, reference, _ = _setting()
    token = sequence_kl(space, _trained(_config("loss/k2/token/none")), reference)
    sequence = sequence_kl(space, _trained(_config("reward/k1/to_go/none")), reference)

    assert float(token) > 1.02 * float(sequence)


def test_k3_in_the_reward_leaves_the_optimum_until_it_overflows():
    assert _distance_to_optimum(_trained(_config("reward/k3/to_go/none"), steps=4)) > 0.1
    with pytest.raises(KLOverflowError, match="the policy has left the reference"):
        _trained(_config("reward/k3/to_go/none"))


def test_k3_in_the_reward_does_not_hold_the_policy():
    space, reference, _ = _setting()
    drifted = reference + random_parameters(space, seed=9, scale=1.0)
    before = float(sequence_kl(space, drifted, reference))
    pulled, pushed = (
        float(sequence_kl(space, _trained(_config(name), steps=1, start=drifted, with_reward=False), reference))
        for name in ("reward/k1/to_go/none", "reward/k3/to_go/none")
    )

    assert pulled < 0.5 * before
    assert pushed > before
