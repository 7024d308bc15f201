"""Weights moved by noise or along a gradient are the same in every layout, and the optimizer knows of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer

LAYOUTS = {"one_rank": (1, 1, 1), "tp2": (2, 2, 1), "pp2": (2, 1, 2), "dp2": (2, 1, 1)}
"""Ranks, tensor parallel, pipeline parallel."""
SCALE, ETA, SMALL_ETA = 0.1, 0.05, 2e-3


@dataclass
class Moved:
    """Weights before and after each move, with the gradient of the second."""

    start: dict[str, Tensor]
    perturbed: dict[str, Tensor]
    gradient: dict[str, Tensor]
    stepped: dict[str, Tensor]
    logprobs: Tensor


def moves(folder: Path, layout: tuple[int, int, int], dtype: torch.dtype, eta: float) -> Moved:
    """Perturb, take a gradient, move against it, score."""
    _, tensor, pipeline = layout
    with trainer(folder, tensor=tensor, pipeline=pipeline, dtype=dtype) as engine:

        def weights() -> dict[str, Tensor]:
            return {name: weight.clone() for name, weight in engine.export_weights()}

        batch = rollout_batch()
        start = weights()
        engine.perturb(scale=SCALE, seed=7)
        perturbed = weights()
        engine.forward_backward(train_batch(batch), policy_loss(batch), keep_whole_gradient=True)
        gradient = {name: g.clone() for name, g in engine.export_gradients(engine.keep_gradient())}
        engine.move(eta=eta)
        return Moved(start, perturbed, gradient, weights(), engine.score(batch).old_logprobs)


def step_without_rate(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after a perturbation, and after an optimizer step of no length."""
    with trainer(folder, dtype=dtype) as engine:
        batch = rollout_batch()
        engine.perturb(scale=SCALE, seed=7)
        before = {name: weight.clone() for name, weight in engine.export_weights()}
        engine.forward_backward(train_batch(batch), policy_loss(batch))
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.optimizer.step()
        return before, {name: weight.clone() for name, weight in engine.export_weights()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, FAMILIES[name]) for name in ("qwen2_tied", "qwen2_untied")}


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen2_untied"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_moves_are_the_same_in_every_layout(folders: dict[str, Path], family: str, layout: str) -> None:
    """Noise bit for bit; a step up to its gradient's rounding. Equal logprobs: a tied head follows its embedding."""
    (expected,) = run_ranks(1, moves, folders[family], LAYOUTS["one_rank"], torch.float32, ETA)
    for found in run_ranks(LAYOUTS[layout][0], moves, folders[family], LAYOUTS[layout], torch.float32, ETA):
        assert found.perturbed.keys() == expected.perturbed.keys()
        for name, weight in expected.perturbed.items():
            assert torch.equal(found.perturbed[name], weight), name
            torch.testing.assert_close(found.stepped[name], expected.stepped[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=2e-4)


def test_perturbation_has_the_stated_size_and_the_step_is_exact(folders: dict[str, Path]) -> None:
    (found,) = run_ranks(1, moves, folders["qwen2_tied"], LAYOUTS["one_rank"], torch.float32, ETA)
    for name, weight in found.start.items():
        change, size = (found.perturbed[name] - weight).square().mean().sqrt(), weight.square().mean().sqrt()
        # the smallest tensors have 16 entries: their sample deviation is off by up to a half
        assert float(change / size) == pytest.approx(SCALE, rel=0.5 if weight.numel() < 100 else 0.1), name
        assert torch.equal(found.stepped[name], found.perturbed[name] - ETA * found.gradient[name]), name
    assert sum(float(g.norm()) for g in found.gradient.values()) > 0


@pytest.mark.parametrize("layout", ["one_rank", "tp2"])
def test_a_small_step_survives_bf16(folders: dict[str, Path], layout: str) -> None:
    """Rounded at random the step holds on average; to nearest, the part of it below bf16's spacing would be lost."""
    results = run_ranks(LAYOUTS[layout][0], moves, folders["qwen2_tied"], LAYOUTS[layout], torch.bfloat16, SMALL_ETA)
    for found in results:
        before, after, gradient = (
            torch.cat([part[name].flatten().double() for name in found.start])
            for part in (found.perturbed, found.stepped, found.gradient)
        )
        spacing = before.abs() * 2**-8  # at least this; at most twice
        small = (SMALL_ETA * gradient).abs() < spacing / 4  # nearest rounding drops all of these
        assert small.sum() > 1000
        square = gradient[small].square().sum()
        moved = float(((before - after) * gradient)[small].sum() / square)
        variance = SMALL_ETA * gradient.abs() * 2 * spacing  # of up or down with the right mean, at most
        noise = float((variance * gradient.square())[small].sum().sqrt() / square)
        assert noise < SMALL_ETA / 4, "there must be enough of them to tell"
        assert abs(moved - SMALL_ETA) < 3 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_goes_on_from_the_moved_weights(folders: dict[str, Path], dtype: torch.dtype) -> None:
    """Its own float32 copies of bf16 weights would bring the old ones back."""
    ((before, after),) = run_ranks(1, step_without_rate, folders["qwen2_tied"], dtype)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
