"""Transformer Engine's layers against Megatron's local ones, and 8-bit products against bf16."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_klrl.config.precision import fp8_refusal
from megatron_klrl.config.recipe import Fp8
from tests.gpu.programs import Update, carried, update
from tests.mcore.test_primary_weights import SHAPE, following, training
from tests.mcore.test_primary_weights import carried as kept_or_not
from tests.support.models import write_model
from tests.support.ranks import run_ranks

# nats; bf16 carries 8 bits, so two orders of adding differ by a per cent of a logit here and there
BF16_MEAN, BF16_LARGEST = 0.02, 0.5
# the band that 8-bit products must stay in: mean |difference| of log-probabilities, and of the loss by its own size
FP8_MEAN, FP8_LOSS = 0.15, 0.1


@pytest.fixture(autouse=True)
def _transformer_engine() -> None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        pytest.skip(f"Transformer Engine cannot be imported: {error}")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_model(tmp_path / "small", SHAPE)


def one(folder: Path, layers: str, fp8: str = "none", **options: object) -> Update:
    (found,) = run_ranks(1, update, folder, layers, fp8, "bfloat16", options)
    return found


def gap(left: Update, right: Update) -> torch.Tensor:
    return (left.logprobs - right.logprobs)[left.mask].abs()


@pytest.mark.parametrize("options", [{}, {"tokens_per_microbatch": 256}], ids=["padded", "packed"])
@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_both_kinds_of_layers_compute_the_same(
    request: pytest.FixtureRequest, model: str, options: dict[str, int]
) -> None:
    folder = request.getfixturevalue(model)
    fused, local = one(folder, "fused", **options), one(folder, "local", **options)
    assert gap(fused, local).mean() < BF16_MEAN
    assert gap(fused, local).max() < BF16_LARGEST
    assert fused.loss == pytest.approx(local.loss, rel=0.05)
    assert fused.grad_norm == pytest.approx(local.grad_norm, rel=0.05)
    for name, gradient in local.gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), fused.gradients[name].flatten(), dim=0)
        assert cosine > 0.98, name


@pytest.mark.parametrize("model", ["dense", "mixture"])
@pytest.mark.parametrize(("writes", "reads"), [("fused", "local"), ("local", "fused")])
def test_a_checkpoint_of_one_kind_loads_in_the_other(
    request: pytest.FixtureRequest, model: str, writes: str, reads: str
) -> None:
    assert run_ranks(1, carried, request.getfixturevalue(model), writes, reads, "bfloat16") == [True]


@pytest.mark.parametrize("options", [{}, {"tokens_per_microbatch": 256}], ids=["padded", "packed"])
@pytest.mark.parametrize("fp8", [fp8 for fp8 in Fp8 if fp8 is not Fp8.NONE])
def test_8_bit_products_stay_in_their_band(dense: Path, fp8: Fp8, options: dict[str, int]) -> None:
    refused = fp8_refusal(fp8, [torch.cuda.get_device_capability()])
    if refused is not None:
        pytest.skip(refused)
    rounded, exact = one(dense, "fused", str(fp8), **options), one(dense, "fused", **options)
    assert 0 < gap(rounded, exact).mean() < FP8_MEAN, "8-bit products differ, and not by much"
    assert rounded.loss == pytest.approx(exact.loss, abs=FP8_LOSS * max(1.0, abs(exact.loss)))


@pytest.mark.parametrize("fp8", [Fp8.TENSORWISE, Fp8.BLOCKWISE])
def test_weights_in_8_bits_alone_are_those_that_bf16_ones_are_rounded_to(dense: Path, fp8: Fp8) -> None:
    refused = fp8_refusal(fp8, [torch.cuda.get_device_capability()])
    if refused is not None:
        pytest.skip(refused)
    alone, copied = one(dense, "fused", str(fp8), primary_weights=True), one(dense, "fused", str(fp8))
    assert gap(alone, copied).mean() < BF16_MEAN
    assert alone.loss == pytest.approx(copied.loss, rel=0.05)
    assert alone.grad_norm == pytest.approx(copied.grad_norm, rel=0.05)


@pytest.mark.parametrize("program", [training, following], ids=["training", "reference"])
def test_weights_in_8_bits_alone_are_trained_and_followed(small: Path, program: Callable[..., list[bool]]) -> None:
    arguments = [False] if program is following else []
    assert all(run_ranks(1, program, small, *arguments)[0])


@pytest.mark.parametrize(("written_by", "read_by"), [("8 bits", "8 bits"), ("8 bits", "bf16"), ("bf16", "8 bits")])
def test_a_checkpoint_of_8_bit_weights_goes_on(small: Path, written_by: str, read_by: str) -> None:
    assert run_ranks(1, kept_or_not, small, written_by, read_by) == [[True, True]]


def test_first_and_last_layer_in_bf16_round_less(dense: Path) -> None:
    exact = one(dense, "fused")
    whole = gap(one(dense, "fused", "tensorwise"), exact).mean()
    inner = gap(one(dense, "fused", "tensorwise", first_last_bf16=True), exact).mean()
    assert 0 < inner < whole
