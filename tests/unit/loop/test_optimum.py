"""The closed-form optimum against direct maximisation."""

import math

import pytest
import torch

from megatron_klrl.loop.closed_form import optimal_point


def maximised(rate: float, beta: float) -> tuple[float, float, float]:
    """Maximise a - beta KL(Bernoulli(a) || Bernoulli(rate)) over a grid: for a 0/1 reward only the split matters."""
    a = torch.linspace(1e-7, 1 - 1e-7, 2_000_001, dtype=torch.float64)
    kl = a * (a / rate).log() + (1 - a) * ((1 - a) / (1 - rate)).log()
    objective = a - beta * kl
    best = int(objective.argmax())
    return float(a[best]), float(kl[best]), float(objective[best])


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0])
def test_closed_form_is_the_maximum(rate: float, beta: float) -> None:
    accuracy, kl, objective = maximised(rate, beta)
    point = optimal_point([rate], beta=beta)
    assert point.accuracy == pytest.approx(accuracy, abs=1e-5)
    assert point.kl == pytest.approx(kl, abs=1e-4)
    assert point.objective == pytest.approx(objective, abs=1e-9)


def test_prompts_are_averaged_and_extremes_are_finite() -> None:
    point = optimal_point([0.0, 1.0], beta=0.001)
    assert point.accuracy == pytest.approx(0.5)
    assert point.kl == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(optimal_point([0.3], beta=1e-4).objective)


def test_beta_zero_has_no_optimum() -> None:
    with pytest.raises(ValueError, match="beta"):
        optimal_point([0.5], beta=0.0)
