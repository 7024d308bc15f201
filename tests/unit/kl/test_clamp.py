"""kl.log_ratio_clamp: off unless asked for, a gradient beyond the bound, and never silent."""

import math

import pytest
import torch

from megatron_klrl.kl import KLConfig, kl_surrogate, refusal

MASK = torch.ones(1, 2, dtype=torch.bool)
BOUND = 2.0


def gradient(config: KLConfig, log_ratios: list[float]) -> list[float]:
    """d surrogate / d logprob at tokens with these log(policy/reference)."""
    logprobs = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    kl_surrogate(logprobs, torch.zeros(1, 2, dtype=torch.float64), MASK, config=config).sum().backward()
    assert logprobs.grad is not None
    return logprobs.grad[0].tolist()


def loss(estimator: str, clamp: float | None) -> KLConfig:
    return KLConfig(beta=1.0, estimator=estimator, placement="loss", credit="token", log_ratio_clamp=clamp)


@pytest.mark.parametrize(("estimator", "slope"), [("k3", lambda x: 1 - math.exp(-x)), ("k2", lambda x: x)])
def test_beyond_the_bound_the_gradient_is_that_at_the_bound(estimator: str, slope) -> None:
    """torch.clamp would give zero there; inside the bound nothing changes."""
    inside, outside = 1.5, -5.0
    assert gradient(loss(estimator, BOUND), [inside, outside]) == pytest.approx(
        [slope(inside), slope(-BOUND)], rel=1e-12
    )
    assert gradient(loss(estimator, None), [inside, outside]) == pytest.approx(
        [slope(inside), slope(outside)], rel=1e-12
    )


def test_a_clamp_prevents_the_overflow_that_is_an_error_without_it() -> None:
    logprobs = torch.tensor([[-200.0, -1.0]], requires_grad=True)
    arguments = (logprobs, torch.tensor([[-1.0, -1.0]]), MASK)
    with pytest.raises(OverflowError, match="0, 0"):
        kl_surrogate(*arguments, config=loss("k3", None))
    assert torch.isfinite(kl_surrogate(*arguments, config=loss("k3", BOUND))).all()


@pytest.mark.parametrize("estimator", ["k1", "abs", "exact"])
def test_a_clamp_without_effect_is_refused(estimator: str) -> None:
    placement = {"placement": "loss", "credit": "token"}
    with pytest.raises(ValueError, match="log_ratio_clamp has no effect"):
        KLConfig(estimator=estimator, log_ratio_clamp=BOUND, **placement)
    with pytest.raises(ValueError, match="greater than 0"):
        KLConfig(estimator="k3", log_ratio_clamp=0.0, **placement)


def test_a_clamp_bends_the_objective_and_a_run_with_it_is_refused() -> None:
    clamped = KLConfig(estimator="k3", placement="both", credit="to_go", log_ratio_clamp=BOUND)
    refused = refusal(clamped, on_policy=True)
    assert refused is not None
    assert "2 nats" in refused.reason
    assert refused.nearest.log_ratio_clamp is None
    assert refusal(refused.nearest, on_policy=True) is None
