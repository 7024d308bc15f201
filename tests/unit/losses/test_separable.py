"""What a loss says of where it may be cut, for every surrogate and every KL configuration: cut it and add up."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.batch import TrainBatch
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.kl import KLConfig, catalogue
from megatron_klrl.kl.config import Placement
from megatron_klrl.loop.update import policy_loss
from megatron_klrl.losses.policy_loss import PolicyLoss, Separable
from megatron_klrl.rl.surrogates import SURROGATES
from tests.unit.config.folders import make_recipe

ROWS, WIDTH = 4, 5
CONFIGS = [entry.config.model_copy(update={"beta": 0.3}) for entry in catalogue()]
LOSS_SIDES = [config for config in CONFIGS if config.placement is not Placement.REWARD]

Piece = tuple[TrainBatch, Tensor]
"""Some tokens ``[b, s]`` of an update, and their places in it."""


def update() -> TrainBatch:
    """Ragged rows, every log-probability its own, ratios on either side of every bound."""
    generator = torch.Generator().manual_seed(5)
    size = (ROWS, WIDTH)
    old = -2 * torch.rand(size, generator=generator, dtype=torch.float64)
    return TrainBatch(
        tokens=torch.zeros(ROWS, WIDTH + 1, dtype=torch.long),
        response_mask=torch.tensor(
            [[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool
        ),
        advantages=torch.randn((ROWS, 1), generator=generator, dtype=torch.float64).expand(size),
        token_weights=torch.rand(size, generator=generator, dtype=torch.float64),
        old_logprobs=old,
        importance_weights=torch.rand(size, generator=generator, dtype=torch.float64),
        kl_advantages=torch.randn(size, generator=generator, dtype=torch.float64),
        ref_logprobs=old + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64),
        rollout_logprobs=old + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64),
    )


def leaves() -> list[Tensor]:
    """Log-probabilities, entropy and full-vocabulary KL."""
    generator = torch.Generator().manual_seed(6)
    moved = update().old_logprobs + 0.4 * torch.randn((ROWS, WIDTH), generator=generator, dtype=torch.float64)
    positive = torch.rand((2, ROWS, WIDTH), generator=generator, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (moved, *positive)]


def summed(loss: PolicyLoss, pieces: Iterator[Piece]) -> list[Tensor]:
    """Value, gradients and metrics of an update in pieces."""
    given = leaves()
    total, counted = torch.zeros(()), dict.fromkeys(loss.metrics, 0.0)
    for rows, places in pieces:
        logprobs, entropy, full_kl = (tensor.flatten()[places] for tensor in given)
        value, metrics = loss(logprobs, rows, full_kl=full_kl, entropy=entropy)
        total = total + value
        counted = {name: counted[name] + float(metrics[name]) for name in counted}
    gradients = torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)
    return [total.detach(), *gradients, torch.tensor(list(counted.values()))]


def whole() -> Iterator[Piece]:
    yield update(), torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)


def rows_apart() -> Iterator[Piece]:
    for row in range(ROWS):
        yield update().rows(slice(row, row + 1)), torch.arange(WIDTH)[None] + row * WIDTH


def columns() -> Iterator[Piece]:
    batch, places = update(), torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
    for column in range(WIDTH):
        only = slice(column, column + 1)
        cut = {name: getattr(batch, name)[:, only] for name in TENSORS}
        yield replace(batch, tokens=batch.tokens[:, column : column + 2], **cut), places[:, only]


TENSORS = (
    "response_mask",
    "advantages",
    "token_weights",
    "old_logprobs",
    "importance_weights",
    "kl_advantages",
    "ref_logprobs",
    "rollout_logprobs",
)


def response_tokens_in_runs() -> Iterator[Piece]:
    """As the output layer does it: response tokens alone, three at a time, across the borders of rows."""
    for run in update().response_mask.flatten().nonzero().squeeze(-1).split(3):
        yield update().at(run), run[None]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Up to the order of a sum in float64; metrics are float32."""
    return all(
        torch.allclose(a.double(), b.double(), rtol=1e-6 if a is found[-1] else 1e-12, atol=1e-12)
        for a, b in zip(found, expected, strict=True)
    )


def check(loss: PolicyLoss) -> None:
    expected = summed(loss, whole())
    assert same(summed(loss, rows_apart()), expected), "rows can always be parted"
    cut = [summed(loss, pieces()) for pieces in (columns, response_tokens_in_runs)]
    if loss.separable is Separable.TOKENS:
        assert all(same(found, expected) for found in cut)
    else:
        assert not any(same(found, expected) for found in cut), "said to need whole sequences, and does not"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(make_recipe(tmp_path), ["algorithm.entropy_bonus=0.2"])


def with_kl(recipe: Recipe, config: KLConfig) -> Recipe:
    return recipe.model_copy(update={"kl": config})


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_can_be_cut_where_it_says(recipe: Recipe, name: str) -> None:
    algorithm = recipe.algorithm.model_copy(update={"surrogate": name})
    loss = policy_loss(recipe.model_copy(update={"algorithm": algorithm}), update())
    assert loss.separable is (Separable.SEQUENCES if name == "gspo" else Separable.TOKENS)
    check(loss)


@pytest.mark.parametrize("config", LOSS_SIDES, ids=lambda config: config.name)
def test_every_loss_side_can_be_cut_where_it_says(recipe: Recipe, config: KLConfig) -> None:
    check(policy_loss(with_kl(recipe, config), update()))


def test_of_the_loss_sides_some_can_be_cut_anywhere(recipe: Recipe) -> None:
    found = {config.name: policy_loss(with_kl(recipe, config), update()).separable for config in LOSS_SIDES}
    assert found["loss/k3/token/token"] is Separable.TOKENS
    assert found["both/exact/to_go/none"] is Separable.TOKENS
    assert found["loss/k2/sequence/none"] is Separable.SEQUENCES
    assert found["loss/k1/to_go/prefix"] is Separable.SEQUENCES


def test_one_part_that_needs_whole_sequences_is_enough(recipe: Recipe) -> None:
    configs = {
        name: next(c for c in LOSS_SIDES if c.name == name) for name in ("loss/k3/token/none", "loss/k2/sequence/none")
    }
    for surrogate, config in product(("reinforce", "gspo"), configs.values()):
        algorithm = recipe.algorithm.model_copy(update={"surrogate": surrogate})
        loss = policy_loss(with_kl(recipe, config).model_copy(update={"algorithm": algorithm}), update())
        whole_rows = surrogate == "gspo" or config.credit == "sequence"
        assert loss.separable is (Separable.SEQUENCES if whole_rows else Separable.TOKENS)


def test_a_kl_in_the_reward_alone_can_be_cut_whatever_its_correction(recipe: Recipe) -> None:
    """Its ratios are taken when its advantages are made, of whole sequences."""
    for config in CONFIGS:
        if config.placement is Placement.REWARD:
            assert policy_loss(with_kl(recipe, config), update()).separable is Separable.TOKENS
