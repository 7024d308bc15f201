"""The train step on a policy that is a table of logits: what it logs, and that the update is the loss's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.step import train_on
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from megatron_klrl.metrics.names import known
from megatron_klrl.runtime.timers import Timers
from tests.unit.config.folders import make_recipe

VOCABULARY = 5


@dataclass
class TableTrainer:
    """A train engine whose policy knows the token before: logits ``[V, V]``, plain gradient descent."""

    table: Tensor
    drift: float = 0.0
    """Moves the policy between scoring and the gradient, as an update in between would."""
    step: int = 0
    gradient: Tensor = field(default_factory=lambda: torch.zeros(VOCABULARY, VOCABULARY))

    def _logprobs(self, tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.log_softmax(table, -1)[tokens[:, :-1]]
        return every.gather(-1, tokens[:, 1:, None]).squeeze(-1), -(every.exp() * every).sum(-1)

    def score(self, batch: RolloutBatch) -> TokenScores:
        logprobs, entropy = self._logprobs(batch.tokens, self.table)
        uniform = torch.full_like(logprobs, -torch.log(torch.tensor(float(VOCABULARY))).item())
        return TokenScores(
            old_logprobs=logprobs, entropy=entropy, ref_logprobs=uniform, full_kl=-uniform.mean() - entropy
        )

    def forward_backward(self, batch: TrainBatch, loss: PolicyLoss) -> SimpleNamespace:
        table = (self.table + self.drift * torch.eye(VOCABULARY, device=self.table.device)).requires_grad_()
        logprobs, entropy = self._logprobs(batch.tokens, table)
        from_uniform = math.log(VOCABULARY) - entropy if loss.needs_full_kl else None
        value, metrics = loss(logprobs, batch, entropy=entropy, full_kl=from_uniform)
        (self.gradient,) = torch.autograd.grad(value, table)
        return SimpleNamespace(loss=float(value.detach()), metrics={name: float(v) for name, v in metrics.items()})

    def split_gradient(self, batch: TrainBatch, loss: PolicyLoss) -> SimpleNamespace:
        of_kl, kl = self.forward_backward(*kl_part(batch, loss)), self.gradient
        of_policy, policy = self.forward_backward(*policy_part(batch, loss)), self.gradient
        self.gradient = kl + policy
        cosine = float((kl * policy).sum() / kl.norm() / policy.norm())
        return SimpleNamespace(
            loss=of_kl.loss + of_policy.loss, metrics=of_policy.metrics, kl_norm=float(kl.norm()), cosine=cosine
        )

    def optim_step(self) -> SimpleNamespace:
        self.table = self.table - 0.1 * self.gradient
        self.step += 1
        return SimpleNamespace(grad_norm=float(self.gradient.norm()), lr=0.1)


def rollouts(trainer: TableTrainer) -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (4, 7), generator=generator)
    logprobs, _ = trainer._logprobs(tokens, trainer.table)
    return RolloutBatch(
        tokens=tokens,
        response_mask=torch.arange(6) >= torch.tensor([1, 2, 3, 1])[:, None],
        rollout_logprobs=logprobs + 0.4 * torch.randn((4, 6), generator=generator),
        rewards=torch.tensor([1.0, 0.0, 0.2, 0.9]),
        truncated=torch.zeros(4, dtype=torch.bool),
        weight_version=torch.zeros(4, dtype=torch.long),
    )


def new_trainer(**settings: float) -> TableTrainer:
    generator = torch.Generator().manual_seed(1)
    return TableTrainer(table=torch.randn((VOCABULARY, VOCABULARY), generator=generator), **settings)


def parts(recipe: Recipe, trainer: TableTrainer) -> Parts:
    return Parts(
        recipe=recipe,
        trainer=trainer,
        timers=Timers(),
        world=None,
        engine=None,
        beta_rule=None,
        task=None,
        evaluation={},
        stop_ids=(),
    )


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    file = make_recipe(tmp_path)
    return lambda *overrides: load_recipe(file, overrides)


def run(recipe: Recipe, trainer: TableTrainer, *, split: bool = False) -> dict[str, float]:
    metrics, _ = train_on(rollouts(trainer), parts(recipe, trainer), beta=recipe.kl.beta, split_gradient=split)
    assert all(known(name) for name in metrics)
    return metrics


def test_every_metric_is_finite_and_the_policy_moves(load: Callable[..., Recipe]) -> None:
    trainer = new_trainer()
    before = trainer.table
    metrics = run(load(), trainer)
    assert metrics["policy/clip_fraction"] == 0.0
    assert not any(name.startswith("mismatch/") and name.endswith(("fraction", "ess")) for name in metrics)
    assert not torch.equal(trainer.table, before)


@pytest.mark.parametrize(("surrogate", "bound"), [("ppo_clip", 0.05), ("gspo", 0.01), ("cispo", 0.05)])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_clip_fraction_is_the_losss(load: Callable[..., Recipe], surrogate: str, bound: float, parts: int) -> None:
    """0 on-policy; some where the policy has moved since it was scored."""
    recipe = load(f"algorithm.surrogate={surrogate}", f"algorithm.clip_low={bound}", f"algorithm.clip_high={bound}")
    found = [run(recipe, new_trainer(drift=drift), split=parts == 2) for drift in (0.0, 0.1)]
    assert found[0]["policy/clip_fraction"] == 0.0
    assert 0.0 < found[1]["policy/clip_fraction"] < 1.0


def test_a_correction_is_logged_by_its_name(load: Callable[..., Recipe]) -> None:
    truncated = run(load("mismatch.correction=token_truncate", "mismatch.high=1.2"), new_trainer())
    masked = run(load("mismatch.correction=token_mask", "mismatch.low=0.8", "mismatch.high=1.2"), new_trainer())
    assert 0 < truncated["mismatch/truncated_fraction"] < masked["mismatch/masked_fraction"] < 1
    assert 0 < masked["mismatch/ess"] < truncated["mismatch/ess"] < 1
    assert "mismatch/masked_fraction" not in truncated
    assert "mismatch/truncated_fraction" not in masked


def test_in_two_parts_the_update_is_the_same(load: Callable[..., Recipe]) -> None:
    recipe = load("algorithm.entropy_bonus=0.1", "mismatch.correction=sequence_truncate")
    whole, apart = new_trainer(), new_trainer()
    at_once, in_parts = run(recipe, whole), run(recipe, apart, split=True)
    torch.testing.assert_close(whole.table, apart.table, rtol=1e-5, atol=1e-6)
    assert in_parts["policy/loss"] == pytest.approx(at_once["policy/loss"], rel=1e-5)
    assert in_parts["grad/kl_norm"] > 0


def test_the_entropy_bonus_raises_the_entropy(load: Callable[..., Recipe]) -> None:
    def entropy_after(bonus: float) -> float:
        trainer = new_trainer()
        recipe = load("kl.beta=0", f"algorithm.entropy_bonus={bonus}")
        for _ in range(20):
            run(recipe, trainer)
        return float(trainer.score(rollouts(trainer)).entropy.mean())

    assert entropy_after(1.0) > entropy_after(0.0) + 0.1


def test_what_is_not_finite_stops_the_run(load: Callable[..., Recipe]) -> None:
    trainer = new_trainer()
    trainer.drift = float("nan")
    with pytest.raises(WorkError, match=r"not finite in update 1: .*policy/loss is nan.*given to the engine"):
        run(load("kl.beta=0"), trainer)
