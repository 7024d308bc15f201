"""A whole train step on tensors of another device than the CPU's: nothing in it is made on the CPU by accident."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.kl.catalogue import meaningful_axes
from megatron_klrl.loop.step import train_on
from tests.support.elsewhere import AWAY, elsewhere, sent
from tests.unit.config.folders import make_recipe
from tests.unit.loop.test_step import TableTrainer, new_trainer, parts, rollouts

NAMES = ("placement", "estimator", "credit", "correction")


def same_there_and_here(recipe: Recipe, **settings: float) -> None:
    here = new_trainer(**settings)
    batch = rollouts(here)
    wanted, _ = train_on(batch, parts(recipe, here), beta=recipe.kl.beta, split_gradient=True)
    with elsewhere() as away:
        there = TableTrainer(table=away(new_trainer(**settings).table), gradient=away(torch.zeros(5, 5)), **settings)
        found, _ = train_on(sent(batch, away), parts(recipe, there), beta=recipe.kl.beta, split_gradient=True)
    assert found == wanted
    assert there.table.device == AWAY
    assert torch.equal(there.table.cpu(), here.table)


def test_two_devices_do_not_mix() -> None:
    with elsewhere() as away:
        there = away(torch.ones(3))
        assert (there + 1).device == torch.zeros(2, device=there.device).device == AWAY
        assert there[torch.tensor([0, 2])].sum().item() == 2
        with pytest.raises(RuntimeError, match=r"add.* of tensors on two devices; .* shape \[\(3,\)\]"):
            there + torch.ones(3)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    file = make_recipe(tmp_path)
    return lambda *overrides: load_recipe(file, overrides)


@pytest.mark.parametrize("axes", meaningful_axes(), ids=lambda axes: "-".join(str(getattr(axes, n)) for n in NAMES))
def test_every_kl_configuration(load: Callable[..., Recipe], axes: object) -> None:
    settings = [f"kl.{name}={getattr(axes, name)}" for name in NAMES]
    same_there_and_here(load(*settings, "kl.allow_biased=true"), drift=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.surrogate=ppo_clip", "algorithm.advantage=grpo", "algorithm.entropy_bonus=0.01"),
        ("algorithm.surrogate=gspo", "algorithm.advantage=dr_grpo"),
        ("algorithm.surrogate=cispo", "algorithm.aggregation=constant_norm", "algorithm.norm_length=8"),
        ("mismatch.correction=token_truncate", "mismatch.high=1.2"),
        ("mismatch.correction=sequence_mask", "mismatch.low=0.5", "mismatch.high=2"),
        ("mismatch.correction=prefix_truncate", "mismatch.high=2"),
        ("algorithm.overlong=mask",),
    ],
)
def test_algorithms(load: Callable[..., Recipe], overrides: tuple[str, ...]) -> None:
    same_there_and_here(load(*overrides), drift=0.1)
