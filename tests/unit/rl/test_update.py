"""From a recipe to an update: what reaches the policy gradient, and that none of it reaches the KL."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.loop.update import assemble, mismatch_weights, policy_loss
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from tests.unit.config.folders import RECIPE, make_recipe

MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [False, True, True]])
OLD = torch.tensor([[-1.0, -1.5, 0.0], [-0.5, -2.0, -1.0], [-0.7, 0.0, 0.0], [0.0, -1.2, -0.3]])
GAP = torch.tensor([[1.0, -0.2, 0.0], [0.1, 0.3, 0.4], [-0.9, 0.0, 0.0], [0.0, 0.0, 0.2]])
"""Trainer less engine: the first row's token and the second row's product lie above 2."""


def sampled() -> tuple[RolloutBatch, TokenScores]:
    batch = RolloutBatch(
        tokens=torch.ones((4, 4), dtype=torch.int64),
        response_mask=MASK,
        rollout_logprobs=OLD - GAP,
        rewards=torch.tensor([1.0, 0.0, 3.0, 0.5]),
        truncated=torch.zeros(4, dtype=torch.bool),
        weight_version=torch.zeros(4, dtype=torch.int64),
    )
    ref = OLD - torch.tensor([[0.2, -0.3, 0.0], [0.5, 0.1, -0.4], [0.3, 0.0, 0.0], [0.0, 0.6, -0.1]])
    full_kl = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.4, 0.5], [0.6, 0.0, 0.0], [0.0, 0.7, 0.8]])
    return batch, TokenScores(old_logprobs=OLD, entropy=torch.ones(4, 3), ref_logprobs=ref, full_kl=full_kl)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """Both sides of the KL, so that either could be touched."""
    kl = "kl: {beta: 0.3, placement: both, estimator: k3, credit: to_go, allow_biased: true}\n"
    return make_recipe(tmp_path, RECIPE + kl)


def update(recipe: Recipe) -> tuple[TrainBatch, PolicyLoss]:
    batch = assemble(*sampled(), recipe)
    return batch, policy_loss(recipe, batch)


def gradient(batch: TrainBatch, loss: PolicyLoss) -> Tensor:
    """In the log-probabilities, away from the old ones."""
    moved = (OLD + torch.tensor([[0.5, -0.5, 0.0]])).requires_grad_()
    value, _ = loss(moved, batch, entropy=torch.ones(4, 3))
    return torch.autograd.grad(value, moved)[0]


VARIANTS = [
    "algorithm.advantage=grpo",
    "algorithm.surrogate=ppo_clip",
    "algorithm.surrogate=gspo",
    "algorithm.surrogate=cispo",
    "algorithm.aggregation=sequence_mean",
    "algorithm.aggregation=token_mean",
    "algorithm.aggregation=constant_norm",
    "mismatch.correction=token_truncate",
    "mismatch.correction=token_mask mismatch.high=2",
    "mismatch.correction=sequence_truncate",
    "mismatch.correction=sequence_mask",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_changes_the_policy_gradient_and_nothing_the_kl(recipe_file: Path, variant: str) -> None:
    plain, changed = (update(load_recipe(recipe_file, overrides)) for overrides in ([], variant.split()))
    assert torch.equal(gradient(*kl_part(*changed)), gradient(*kl_part(*plain)))
    assert gradient(*kl_part(*plain)).abs().sum() > 0
    assert not torch.allclose(gradient(*policy_part(*changed)), gradient(*policy_part(*plain)))


def test_without_a_correction_weights_are_one(recipe_file: Path) -> None:
    batch, _ = update(load_recipe(recipe_file))
    assert torch.equal(batch.importance_weights, torch.ones(4, 3))
    assert mismatch_weights(*sampled(), load_recipe(recipe_file)) is None


def test_the_correction_and_its_bound_reach_the_batch(recipe_file: Path) -> None:
    overrides = ["mismatch.correction=sequence_mask", "mismatch.low=0.5", "mismatch.high=2"]
    batch, _ = update(load_recipe(recipe_file, overrides))
    expected = torch.ones(4, 3)
    expected[0, :2] = 0.0  # e^.8
    expected[1] = 0.0  # e^.8
    expected[2, 0] = 0.0  # e^-.9
    expected[3, 1:] = torch.tensor(0.2).exp()
    torch.testing.assert_close(batch.importance_weights, expected, rtol=1e-6, atol=0)


def test_old_log_probabilities_are_the_trainers_own(recipe_file: Path) -> None:
    """The surrogate's ratio is to them; the engine's are for the corrections."""
    batch, loss = update(load_recipe(recipe_file, ["algorithm.surrogate=ppo_clip"]))
    assert torch.equal(batch.old_logprobs, OLD)
    assert torch.equal(batch.rollout_logprobs, OLD - GAP)
    _, metrics = loss(OLD.clone(), batch)
    assert metrics["policy/clip_fraction"] == 0, "at the old policy nothing is clipped"


def test_clip_settings_reach_the_loss(recipe_file: Path) -> None:
    """All ratios are e^.1: inside the default bound, outside one of .05; over the update's 8 response tokens."""
    settings = ["algorithm.surrogate=ppo_clip", "algorithm.advantage=dr_grpo"]
    found = []
    for bound in ([], ["algorithm.clip_high=0.05"], ["algorithm.clip_high=0.05", "algorithm.dual_clip=1.01"]):
        batch, loss = update(load_recipe(recipe_file, [*settings, *bound]))
        assert loss.num_tokens == 8
        _, metrics = loss(OLD + 0.1, batch)
        found.append(float(metrics["policy/clip_fraction"]))
    assert found == [0.0, 3 / 8, 1.0], "the better of each pair has 2 and 1 tokens; the dual clip takes the others"


def test_the_constant_is_the_longest_response_unless_it_is_set(recipe_file: Path) -> None:
    default, of_its_own = (
        update(load_recipe(recipe_file, ["algorithm.aggregation=constant_norm", *more]))[0].token_weights
        for more in ([], ["algorithm.norm_length=6"])
    )
    torch.testing.assert_close(default, MASK / (24 * 4.0), rtol=1e-7, atol=0)
    torch.testing.assert_close(of_its_own, MASK / (6 * 4.0), rtol=1e-7, atol=0)


def test_the_entropy_bonus_reaches_the_loss(recipe_file: Path) -> None:
    with_bonus, without = (update(load_recipe(recipe_file, o)) for o in (["algorithm.entropy_bonus=0.1"], []))
    assert not without[1].needs_entropy
    entropy = torch.ones(4, 3).requires_grad_()
    value, _ = with_bonus[1](OLD, with_bonus[0], entropy=entropy)
    (slope,) = torch.autograd.grad(value, entropy)
    torch.testing.assert_close(slope, -0.1 * with_bonus[0].token_weights, rtol=1e-6, atol=0)


def test_denominators_are_those_of_the_whole_update(recipe_file: Path) -> None:
    """Microbatches of one row each add up to the update, loss and metrics."""
    recipe = load_recipe(recipe_file, ["algorithm.surrogate=ppo_clip", "algorithm.aggregation=token_mean"])
    batch, loss = update(recipe)
    moved = OLD + 0.3
    whole, metrics = loss(moved, batch)
    parts = [loss(moved[row : row + 1], batch.rows(slice(row, row + 1))) for row in range(4)]
    torch.testing.assert_close(sum(value for value, _ in parts), whole, rtol=1e-6, atol=1e-7)
    name = "policy/clip_fraction"
    assert float(sum(found[name] for _, found in parts)) == pytest.approx(float(metrics[name]), rel=1e-6)
    assert metrics[name] > 0


def test_an_update_without_a_response_token_is_finite(recipe_file: Path) -> None:
    batch, scores = sampled()
    nothing = replace(batch, response_mask=torch.zeros_like(MASK))
    blank = {f.name: torch.zeros(4, 3) for f in fields(TokenScores)}
    recipe = load_recipe(recipe_file, ["mismatch.correction=sequence_mask"])
    assembled = assemble(nothing, replace(scores, **blank), recipe)
    value, metrics = policy_loss(recipe, assembled)(OLD, assembled)
    assert (float(value), float(metrics["policy/clip_fraction"])) == (0.0, 0.0)
