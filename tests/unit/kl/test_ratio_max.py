"""kl.ratio_max: off unless asked for, cut before anything overflows, direction kept, and never silent."""

import math

import pytest
import torch
from torch import Tensor

from megatron_klrl.kl import KLConfig, Objective, kl_surrogate, refusal
from megatron_klrl.kl.estimators import KLOverflowError
from megatron_klrl.kl.ratios import importance_ratios

MASK = torch.tensor([[True, True, True], [True, True, False]])
LOG_RATIOS = torch.tensor([[1.0, 1.0, -3.0], [-0.5, 2.0, 50.0]], dtype=torch.float64)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rollout = torch.full((2, 3), -60.0, dtype=torch.float64)
    logprobs = (rollout + LOG_RATIOS).requires_grad_()
    return logprobs, logprobs.detach() - torch.tensor([[0.3, -0.2, 0.1], [0.4, 0.2, 0.0]]), rollout


def config(correction: str, *, ratio_max: float | None, **axes: str) -> KLConfig:
    return KLConfig(beta=1.0, correction=correction, ratio_max=ratio_max, **axes)


def gradient(of: KLConfig) -> Tensor:
    logprobs, reference, rollout = inputs()
    value = kl_surrogate(logprobs, reference, MASK, config=of, rollout_logprobs=rollout).sum()
    return torch.autograd.grad(value, logprobs)[0]


def test_the_ratios_by_hand() -> None:
    logprobs, _, rollout = inputs()
    token = importance_ratios(logprobs, rollout, MASK, config=config("token", ratio_max=2.0, credit="token"))
    assert token is not None
    expected = torch.tensor([2, 2, math.exp(-3), math.exp(-0.5), 2], dtype=torch.float64)
    torch.testing.assert_close(token.values, expected, rtol=1e-12, atol=0)
    assert (token.truncated_fraction, token.log_largest) == (pytest.approx(3 / 5), 2.0)
    prefix = importance_ratios(logprobs, rollout, MASK, config=config("prefix", ratio_max=None))
    assert prefix is not None
    expected = torch.tensor([1, 2, -1, -0.5, 1.5], dtype=torch.float64).exp()
    torch.testing.assert_close(prefix.values, expected, rtol=1e-12, atol=0)
    assert (prefix.truncated_fraction, prefix.log_largest) == (0.0, 2.0)
    whole = importance_ratios(logprobs, rollout, MASK, config=config("sequence", ratio_max=3.0, credit="sequence"))
    assert whole is not None
    torch.testing.assert_close(whole.values, torch.tensor([math.exp(-1), 3.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_without_a_correction_there_is_no_ratio() -> None:
    logprobs, _, rollout = inputs()
    assert importance_ratios(logprobs, rollout, MASK, config=KLConfig()) is None
    with pytest.raises(ValueError, match="ratio_max has no effect"):
        KLConfig(ratio_max=2.0)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        config("prefix", ratio_max=0.5)


@pytest.mark.parametrize("axes", [{}, {"placement": "loss", "estimator": "k3"}], ids=["reward", "loss"])
def test_a_bound_that_cuts_nothing_changes_nothing(axes: dict[str, str]) -> None:
    torch.testing.assert_close(
        gradient(config("prefix", ratio_max=1e6, **axes)),
        gradient(config("prefix", ratio_max=None, **axes)),
        rtol=0,
        atol=0,
    )


def test_a_term_that_is_cut_keeps_its_direction() -> None:
    """Ratio x k3, differentiated: each token's gradient shrinks by the factor its ratio does."""
    axes = {"placement": "loss", "estimator": "k3", "credit": "token"}
    whole, cut = (gradient(config("token", ratio_max=bound, **axes)) for bound in (None, 2.0))
    factor = (2.0 / LOG_RATIOS.exp()).clamp(max=1.0)
    torch.testing.assert_close(cut, (whole * factor).where(MASK, 0.0), rtol=1e-12, atol=0)


def test_what_would_overflow_is_cut_or_said() -> None:
    logprobs = torch.zeros(1, 3, requires_grad=True)
    rollout = torch.full((1, 3), -400.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(KLOverflowError, match=r"kl\.ratio_max"):
        kl_surrogate(
            logprobs, logprobs.detach(), mask, config=config("prefix", ratio_max=None), rollout_logprobs=rollout
        )
    found = kl_surrogate(
        logprobs, logprobs.detach() - 1.0, mask, config=config("prefix", ratio_max=4.0), rollout_logprobs=rollout
    )
    assert torch.isfinite(found).all()


def test_a_bound_is_biased_only_where_ratios_are_not_one() -> None:
    bounded = config("prefix", ratio_max=4.0)
    assert refusal(bounded, on_policy=True) is None
    refused = refusal(bounded, on_policy=False)
    assert refused is not None
    assert "kl.ratio_max cuts" in refused.reason
    assert refused.nearest == config("prefix", ratio_max=None)
    biased = refusal(config("token", ratio_max=4.0, credit="token", objective=Objective.SEQUENCE), on_policy=False)
    assert biased is not None
    assert biased.nearest.ratio_max is None
