import math

import pytest
import torch

from megatron_klrl.errors import WorkError
from megatron_klrl.kl.axes import Estimator
from megatron_klrl.kl.estimators import KLOverflowError, absolute, k1, k2, k3, linear_tail

_EXACT = 1e-12  # float64, a handful of operations


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(6, 5, generator=generator, dtype=torch.float64)
    ref_logprobs = -3 * torch.rand(6, 5, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), ref_logprobs


def _slope(value: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), logprobs, retain_graph=True)
    return gradient


def _same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=_EXACT, atol=_EXACT)


def test_values_computed_by_hand():
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])

    # ratio pi/ref = 2: log 2, (log 2)^2 / 2, 1/2 - 1 + log 2, log 2
    values = [float(estimate(logprobs, ref_logprobs)) for estimate in (k1, k2, k3, absolute)]
    swapped = [float(estimate(ref_logprobs, logprobs)) for estimate in (k1, k2, k3, absolute)]

    assert values == pytest.approx([0.693147, 0.240227, 0.193147, 0.693147], abs=1e-6)
    assert swapped == pytest.approx([-0.693147, 0.240227, 0.306853, 0.693147], abs=1e-6)


def test_k1_minus_its_control_variate_is_k3():
    logprobs, ref_logprobs = _pair()
    ratio = (ref_logprobs - logprobs).exp()

    _same(k1(logprobs, ref_logprobs) - (1 - ratio), k3(logprobs, ref_logprobs))


def test_k3_in_both_places_is_k1_in_the_reward_is_k2_in_the_loss():
    logprobs, ref_logprobs = _pair()
    both = k3(logprobs, ref_logprobs).detach() + _slope(k3(logprobs, ref_logprobs), logprobs)

    _same(both, k1(logprobs, ref_logprobs))
    _same(_slope(k2(logprobs, ref_logprobs), logprobs), k1(logprobs, ref_logprobs))


def test_gradients_with_an_importance_ratio():
    logprobs, ref_logprobs = _pair()
    rho = (logprobs - _pair(seed=1)[0].detach()).exp()
    first, second, third = (estimate(logprobs, ref_logprobs) for estimate in (k1, k2, k3))

    _same(_slope(rho * third, logprobs), rho * first)
    _same(_slope(rho.detach() * k2(logprobs, ref_logprobs), logprobs), rho * first)
    _same(_slope(rho * k1(logprobs, ref_logprobs), logprobs), rho * (first + 1))
    _same(_slope(rho * second, logprobs), rho * (first + second))


@pytest.mark.parametrize("weight", [-0.5, 0.0, 1.0, 2.0])
def test_the_control_variate_only_moves_a_constant_of_the_gradient(weight):
    logprobs, ref_logprobs = _pair()
    estimate = k1(logprobs, ref_logprobs) + weight * torch.expm1(ref_logprobs - logprobs)

    _same(estimate.detach() + _slope(estimate, logprobs), k1(logprobs, ref_logprobs) + 1 - weight)


def test_gradients_of_k1_and_absolute():
    logprobs, ref_logprobs = _pair()

    _same(_slope(k1(logprobs, ref_logprobs), logprobs), torch.ones_like(logprobs))
    _same(_slope(absolute(logprobs, ref_logprobs), logprobs), torch.sign(logprobs - ref_logprobs))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("estimate", [k1, k2, k3, absolute])
def test_precision_is_float32_unless_float64_is_given(estimate, dtype, result):
    assert estimate(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)).dtype == result


def test_k3_keeps_its_digits_near_the_reference():
    difference = 1e-3
    logprobs = torch.tensor([0.0], dtype=torch.float32)

    value = float(k3(logprobs, logprobs + difference))

    # exp(d) - 1 - d loses three digits here in float32; expm1 keeps the relative error near 1e-4
    assert value == pytest.approx(math.expm1(difference) - difference, rel=2e-4)


def test_k3_overflow_names_the_tokens():
    logprobs = torch.zeros(2, 3)
    logprobs[1, 2] = -90.0

    with pytest.raises(KLOverflowError, match=r"k3 overflows float32 at \[sequence, token\] \[1, 2\]: .* 90 nats"):
        k3(logprobs, torch.zeros(2, 3))
    assert issubclass(KLOverflowError, WorkError)
    assert torch.isfinite(k3(logprobs.double(), torch.zeros(2, 3).double())).all()


@pytest.mark.parametrize("estimate", [k1, k2, k3, absolute])
def test_shapes_are_never_broadcast(estimate):
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(4,\), logprobs \(4, 4\)"):
        estimate(torch.zeros(4, 4), torch.zeros(4))


@pytest.mark.parametrize("estimator", [Estimator.K1, Estimator.K2, Estimator.K3, Estimator.ABS])
def test_linear_tail_is_the_estimator_inside_the_bound(estimator):
    logprobs, ref_logprobs = _pair()
    estimate = {Estimator.K1: k1, Estimator.K2: k2, Estimator.K3: k3, Estimator.ABS: absolute}[estimator]
    mask = torch.ones_like(logprobs, dtype=torch.bool)

    result = linear_tail(logprobs, ref_logprobs, mask, estimator=estimator, bound=4.0)

    assert torch.equal(result.values, estimate(logprobs, ref_logprobs))
    assert float(result.fraction) == 0.0


@pytest.mark.parametrize(("estimator", "slope"), [(Estimator.K2, -2.0), (Estimator.K3, 1 - math.exp(2.0))])
def test_linear_tail_keeps_value_and_gradient_beyond_the_bound(estimator, slope):
    logprobs = torch.tensor([[-200.0, -2.0, 0.0]], dtype=torch.float32, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)

    result = linear_tail(logprobs, torch.zeros(1, 3), mask, estimator=estimator, bound=2.0)
    gradient = _slope(result.values, logprobs)

    assert float(gradient[0, 0]) == pytest.approx(slope, rel=1e-6)
    assert float((result.values[0, 0] - result.values[0, 1]).detach()) == pytest.approx(-198.0 * slope, rel=1e-6)
    assert float(result.fraction) == pytest.approx(1 / 3)


def test_linear_tail_does_not_read_what_is_masked():
    logprobs = torch.tensor([[float("nan"), -1.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[False, True, False]])

    result = linear_tail(logprobs, torch.zeros(1, 3), mask, estimator=Estimator.K3, bound=0.5)

    assert result.values[0, 0] == result.values[0, 2] == 0.0
    assert float(result.fraction) == 1.0
    assert _slope(result.values, logprobs)[0].tolist() == pytest.approx([0.0, 1 - math.exp(0.5), 0.0], rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "bound", "mask_size", "message"),
    [
        (Estimator.K3, 0.0, 3, "bound must be above 0"),
        (Estimator.K3, float("nan"), 3, "bound must be above 0"),
        (Estimator.EXACT, 1.0, 3, "exact has no sampled log-ratio"),
        (Estimator.K3, 1.0, 2, "mask has shape"),
    ],
)
def test_linear_tail_refuses(estimator, bound, mask_size, message):
    mask = torch.ones(mask_size, dtype=torch.bool)

    with pytest.raises(ValueError, match=message):
        linear_tail(torch.zeros(3), torch.zeros(3), mask, estimator=estimator, bound=bound)
