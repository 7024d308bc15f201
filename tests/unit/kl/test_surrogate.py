"""The surrogate against the published formulas, row by row, in plain Python loops; masks, precision and errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_klrl.errors import WorkError
from megatron_klrl.kl import KLConfig, catalogue, kl_surrogate, loss_terms, reward_coefficients
from megatron_klrl.kl.estimators import KLOverflowError, NonFiniteLogprobError

_EXACT = 1e-12  # float64, a few dozen operations on numbers of order one
_ENTRIES = [entry.config for entry in catalogue()]


def _config(name: str, beta: float = 1.0) -> KLConfig:
    placement, estimator, credit, correction = name.split("/")
    return KLConfig(placement=placement, estimator=estimator, credit=credit, correction=correction, beta=beta)


class _Batch:
    """Random log-probabilities with a mask that has holes, as after a tool call, and ragged ends."""

    def __init__(self, *, rows: int = 5, columns: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def drawn() -> Tensor:
            return (-2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)

        self.logprobs = drawn().requires_grad_()
        self.ref_logprobs, self.rollout_logprobs = drawn(), drawn()
        self.full_kl = (-drawn()).detach().requires_grad_()
        self.mask = torch.rand(rows, columns, generator=generator) > 0.35
        self.mask[0] = False
        self.mask[1] = True

    def surrogate(self, config: KLConfig, *, rollout: bool = True) -> Tensor:
        return kl_surrogate(
            self.logprobs,
            self.ref_logprobs,
            self.mask,
            config=config,
            rollout_logprobs=self.rollout_logprobs if rollout else None,
            full_kl=self.full_kl,
        )

    def gradients(self, config: KLConfig, *, rollout: bool = True) -> tuple[Tensor, Tensor]:
        value = self.surrogate(config, rollout=rollout).sum()
        leaves = (self.logprobs, self.full_kl)
        first, second = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return first, second


def _same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=_EXACT, atol=_EXACT)


# --------------------------------------------------------------- formulas: d surrogate / d logpi_t for each token t


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    """Token ``t`` of a response, and the response: log-ratios to the reference, ratios to the rollout policy, KLs."""

    k: list[float]
    rho: list[float]
    kl: list[float]
    t: int


_Slope = Callable[[_Token], float]


def _k3(x: float) -> float:
    return math.exp(-x) - 1 + x


def _prefix(rho: list[float], t: int) -> float:
    return math.prod(rho[: t + 1])


_SLOPES: dict[str, _Slope] = {
    "reward/k1/sequence/none": lambda x: sum(x.k),
    "reward/k1/to_go/none": lambda x: sum(x.k[x.t :]),
    "reward/k1/token/none": lambda x: x.k[x.t],
    "loss/k1/token/none": lambda _: 1.0,
    "reward/k2/sequence/none": lambda x: sum(each * each / 2 for each in x.k),
    "loss/k2/token/none": lambda x: x.k[x.t],
    "loss/k2/sequence/none": lambda x: sum(x.k),
    "reward/k3/to_go/none": lambda x: sum(map(_k3, x.k[x.t :])),
    "loss/k3/token/none": lambda x: 1 - math.exp(-x.k[x.t]),
    "both/k1/sequence/none": lambda x: sum(x.k) + 1,
    "both/k3/to_go/none": lambda x: sum(map(_k3, x.k[x.t :])) + 1 - math.exp(-x.k[x.t]),
    "both/k2/token/none": lambda x: x.k[x.t] ** 2 / 2 + x.k[x.t],
    "loss/abs/token/none": lambda x: math.copysign(1.0, x.k[x.t]),
    "reward/abs/sequence/none": lambda x: sum(map(abs, x.k)),
    "loss/k3/token/token": lambda x: x.rho[x.t] * x.k[x.t],
    "loss/k2/token/token": lambda x: x.rho[x.t] * x.k[x.t],
    "loss/k1/token/token": lambda x: x.rho[x.t] * (x.k[x.t] + 1),
    "reward/k1/to_go/token": lambda x: x.rho[x.t] * sum(x.k[x.t :]),
    "reward/k1/sequence/token": lambda x: x.rho[x.t] * sum(x.k),
    "reward/k1/sequence/sequence": lambda x: math.prod(x.rho) * sum(x.k),
    "loss/k2/sequence/sequence": lambda x: math.prod(x.rho) * sum(x.k),
    "reward/k1/token/prefix": lambda x: _prefix(x.rho, x.t) * x.k[x.t],
    "reward/k1/to_go/prefix": lambda x: sum(_prefix(x.rho, u) * x.k[u] for u in range(x.t, len(x.k))),
    "both/k3/sequence/sequence": lambda x: math.prod(x.rho) * (sum(map(_k3, x.k)) + 1 - math.exp(-x.k[x.t])),
    "loss/k3/to_go/prefix": lambda x: (
        sum(_prefix(x.rho, u) * _k3(x.k[u]) for u in range(x.t, len(x.k)))
        + _prefix(x.rho, x.t) * (1 - math.exp(-x.k[x.t]))
    ),
    "loss/k1/to_go/prefix": lambda x: (
        sum(_prefix(x.rho, u) * x.k[u] for u in range(x.t, len(x.k))) + _prefix(x.rho, x.t)
    ),
    "reward/exact/sequence/none": lambda x: sum(x.kl),
    "reward/exact/to_go/none": lambda x: sum(x.kl[x.t + 1 :]),
    "loss/exact/token/none": lambda _: 0.0,
    "both/exact/sequence/none": lambda x: sum(x.kl),
    "both/exact/to_go/none": lambda x: sum(x.kl[x.t + 1 :]),
    "both/exact/to_go/prefix": lambda x: sum(_prefix(x.rho, u - 1) * x.kl[u] for u in range(x.t + 1, len(x.kl))),
    "loss/exact/to_go/prefix": lambda x: sum(_prefix(x.rho, u - 1) * x.kl[u] for u in range(x.t + 1, len(x.kl))),
}
# d surrogate / d KL_t of the rows that differentiate the full-vocabulary KL; every other row: zero.
_KL_SLOPES: dict[str, _Slope] = {
    "loss/exact/token/none": lambda _: 1.0,
    "both/exact/sequence/none": lambda _: 1.0,
    "both/exact/to_go/none": lambda _: 1.0,
    "both/exact/to_go/prefix": lambda x: _prefix(x.rho, x.t - 1),
    "loss/exact/to_go/prefix": lambda x: _prefix(x.rho, x.t - 1),
}


def _by_hand(batch: _Batch, slope: _Slope) -> Tensor:
    expected = torch.zeros_like(batch.logprobs, requires_grad=False)
    for row in range(batch.mask.shape[0]):
        columns = batch.mask[row].nonzero().flatten().tolist()
        logprobs, ref, mu, kl = (
            values[row, columns].tolist()
            for values in (batch.logprobs.detach(), batch.ref_logprobs, batch.rollout_logprobs, batch.full_kl.detach())
        )
        k = [a - b for a, b in zip(logprobs, ref, strict=True)]
        rho = [math.exp(a - b) for a, b in zip(logprobs, mu, strict=True)]
        for t, column in enumerate(columns):
            expected[row, column] = slope(_Token(k=k, rho=rho, kl=kl, t=t))
    return expected


@pytest.mark.parametrize("name", _SLOPES)
def test_gradient_of_each_token_is_the_published_formula(name):
    batch = _Batch()

    in_logprobs, in_full_kl = batch.gradients(_config(name))

    _same(in_logprobs, _by_hand(batch, _SLOPES[name]))
    _same(in_full_kl, _by_hand(batch, _KL_SLOPES.get(name, lambda _: 0.0)))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("reward/k1/sequence/none", "loss/k2/sequence/none"),
        ("reward/k1/sequence/sequence", "loss/k2/sequence/sequence"),
        ("reward/k1/token/none", "loss/k2/token/none"),
        ("reward/k1/token/none", "both/k3/token/none"),
        ("loss/k3/token/token", "loss/k2/token/token"),
        ("loss/k3/token/token", "both/k3/token/token"),
        ("loss/k3/token/token", "reward/k1/token/token"),
        ("both/k3/to_go/prefix", "loss/k3/to_go/prefix"),
        ("both/k1/to_go/prefix", "loss/k1/to_go/prefix"),
        ("both/exact/to_go/prefix", "loss/exact/to_go/prefix"),
        ("both/k3/token/prefix", "reward/k1/token/prefix"),
    ],
)
def test_configurations_that_are_the_same_sample_by_sample(left, right):
    batch = _Batch()

    for ours, theirs in zip(batch.gradients(_config(left)), batch.gradients(_config(right)), strict=True):
        _same(ours, theirs)


def test_on_policy_the_prefix_loss_is_k3_in_both_places():
    batch = _Batch()

    dice, _ = batch.gradients(_config("loss/k3/to_go/prefix"), rollout=False)
    both, _ = batch.gradients(_config("both/k3/to_go/none"), rollout=False)

    _same(dice, both)


# ------------------------------------------------------------------------------------------- what holds for every row


@pytest.mark.parametrize("config", _ENTRIES, ids=lambda config: config.name)
def test_surrogate_is_its_two_sides(config):
    batch = _Batch()
    arguments = {"config": config, "rollout_logprobs": batch.rollout_logprobs, "full_kl": batch.full_kl}

    coefficients = reward_coefficients(batch.logprobs, batch.ref_logprobs, batch.mask, **arguments)
    terms = loss_terms(batch.logprobs, batch.ref_logprobs, batch.mask, **arguments)

    _same((coefficients * batch.logprobs + terms).sum(-1), batch.surrogate(config))
    assert not coefficients.requires_grad
    assert (coefficients[~batch.mask] == 0).all()
    assert (terms[~batch.mask] == 0).all()
    assert coefficients.any() == (config.placement != "loss")
    assert terms.any() == (config.placement != "reward")


@pytest.mark.parametrize("config", _ENTRIES, ids=lambda config: config.name)
def test_what_is_masked_is_not_read(config):
    batch, spoiled = _Batch(), _Batch()
    expected = (batch.surrogate(config), *batch.gradients(config))
    for name, garbage in (
        ("logprobs", math.nan),
        ("ref_logprobs", math.inf),
        ("rollout_logprobs", -math.inf),
        ("full_kl", math.nan),
    ):
        values = getattr(batch, name)
        setattr(spoiled, name, torch.where(batch.mask, values, garbage).detach().requires_grad_(values.requires_grad))

    for ours, theirs in zip((spoiled.surrogate(config), *spoiled.gradients(config)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", _ENTRIES, ids=lambda config: config.name)
def test_rows_and_padding_do_not_matter_to_each_other(config):
    batch = _Batch()
    whole = batch.surrogate(config).detach()
    arguments = (batch.logprobs, batch.ref_logprobs, batch.mask, batch.rollout_logprobs, batch.full_kl)
    for row in range(batch.mask.shape[0]):
        logprobs, ref_logprobs, mask, rollout_logprobs, full_kl = (
            torch.nn.functional.pad(values[row : row + 1].detach(), (2, 3)) for values in arguments
        )
        alone = kl_surrogate(
            logprobs, ref_logprobs, mask, config=config, rollout_logprobs=rollout_logprobs, full_kl=full_kl
        )
        _same(alone, whole[row : row + 1])


@pytest.mark.parametrize("config", _ENTRIES, ids=lambda config: config.name)
def test_beta_is_a_factor(config):
    batch = _Batch()
    scaled = config.model_copy(update={"beta": 0.05})
    off = config.model_copy(update={"beta": 0.0})

    _same(batch.surrogate(scaled), 0.05 * batch.surrogate(config))
    assert (batch.surrogate(off) == 0).all()


@pytest.mark.parametrize("config", _ENTRIES, ids=lambda config: config.name)
def test_without_rollout_logprobs_the_policy_itself_sampled(config):
    batch = _Batch()
    implicit = (batch.surrogate(config, rollout=False), *batch.gradients(config, rollout=False))
    batch.rollout_logprobs = batch.logprobs.detach()

    for ours, theirs in zip((batch.surrogate(config), *batch.gradients(config)), implicit, strict=True):
        assert torch.equal(ours, theirs)


def test_no_gradient_reaches_reference_or_rollout_policy():
    batch = _Batch()
    batch.ref_logprobs.requires_grad_()
    batch.rollout_logprobs.requires_grad_()

    value = batch.surrogate(_config("loss/k3/to_go/prefix")).sum()
    gradients = torch.autograd.grad(value, (batch.ref_logprobs, batch.rollout_logprobs), allow_unused=True)

    assert gradients == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["reward/k1/to_go/none", "loss/k3/to_go/prefix", "both/exact/to_go/prefix"])
def test_lower_precision_is_accumulated_in_float32(dtype, name):
    batch = _Batch(rows=3, columns=400, dtype=dtype)
    batch.rollout_logprobs = batch.logprobs.detach() + 0.01
    wide = _Batch(rows=3, columns=400, dtype=dtype)
    for field in ("logprobs", "ref_logprobs", "full_kl"):
        setattr(wide, field, getattr(batch, field).double())
    wide.rollout_logprobs = batch.rollout_logprobs.double()

    value = batch.surrogate(_config(name))

    assert value.dtype == torch.float32
    # 400 float32 additions: relative rounding 400 * 6e-8; bfloat16 accumulation would be off by a percent
    torch.testing.assert_close(value.double(), wide.surrogate(_config(name)), rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_an_empty_surrogate():
    nothing = torch.zeros(0, 4)

    assert kl_surrogate(nothing, nothing, nothing.bool(), config=KLConfig()).shape == (0,)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": torch.zeros(6)}, r"logprobs must be \[B, T\]"),
        ({"ref_logprobs": torch.zeros(1, 6)}, r"ref_logprobs has shape \(1, 6\), logprobs \(5, 6\)"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.ones(5, 6)}, r"mask must be bool, is torch.float32; pass mask.bool\(\)"),
        ({"rollout_logprobs": torch.zeros(5, 5)}, "rollout_logprobs has shape"),
        ({"full_kl": torch.zeros(5, 7)}, "full_kl has shape"),
        ({"full_kl": None}, "full_kl is missing"),
        ({"ref_logprobs": torch.zeros(5, 6, dtype=torch.long)}, "ref_logprobs must be floating point"),
    ],
)
def test_wrong_inputs_are_named(changes, message):
    arguments = {
        "logprobs": torch.zeros(5, 6),
        "ref_logprobs": torch.zeros(5, 6),
        "mask": torch.ones(5, 6, dtype=torch.bool),
        "rollout_logprobs": torch.zeros(5, 6),
        "full_kl": torch.zeros(5, 6),
    } | changes

    with pytest.raises(ValueError, match=message):
        kl_surrogate(**arguments, config=_config("both/exact/to_go/prefix"))


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "rollout_logprobs", "full_kl"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_a_value_that_counts_must_be_finite(name, garbage):
    batch = _Batch()
    values = getattr(batch, name).detach().clone()
    values[1, 3] = garbage
    setattr(batch, name, values)

    with pytest.raises(NonFiniteLogprobError, match=rf"{name} is NaN or infinite at \[sequence, token\] \[1, 3\]"):
        batch.surrogate(_config("both/exact/to_go/prefix"))
    assert issubclass(NonFiniteLogprobError, WorkError)
    assert issubclass(NonFiniteLogprobError, ValueError)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("loss/k3/token/none", "ref_logprobs", r"k3 overflows float32 at \[sequence, token\] \[1, 3\]"),
        ("loss/k3/token/token", "rollout_logprobs", "importance ratio of a token overflows"),
        ("reward/k1/to_go/prefix", "rollout_logprobs", r"ratio of a prefix overflows float32 at .* \[1, 3\], \[1, 4\]"),
        ("reward/k1/sequence/sequence", "rollout_logprobs", "importance ratio of a sequence overflows"),
        ("loss/k2/token/none", "ref_logprobs", "the KL term overflows"),
    ],
)
def test_overflow_names_the_tokens(name, changed, message):
    batch = _Batch(dtype=torch.float32)
    values = getattr(batch, changed).clone()
    values[1, 3] = 1e30 if name.startswith("loss/k2") else 95.0
    if changed == "rollout_logprobs":
        values = -values
        values[0:1] = values[2:] = 0.0
        values[1] = torch.where(torch.arange(6) == 3, -95.0, 0.0)
    setattr(batch, changed, values)

    with pytest.raises(KLOverflowError, match=message):
        batch.surrogate(_config(name))
