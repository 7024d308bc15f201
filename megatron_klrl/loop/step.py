"""The one train step, for rollouts of any age and any number of updates."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import DivergenceError
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.update import (
    assemble,
    mismatch_weights,
    needs_current_scores,
    policy_loss,
    shaped_rewards,
    task_advantages,
)
from megatron_klrl.metrics import step as step_metrics


def at_beta(recipe: Recipe, beta: float) -> Recipe:
    """The recipe with another beta: that of a step."""
    return recipe.model_copy(update={"kl": recipe.kl.model_copy(update={"beta": beta})})


def train_on(
    batch: RolloutBatch, parts: Parts, *, beta: float, split_gradient: bool
) -> tuple[dict[str, float], TokenScores]:
    """Score a batch, then take the gradient of the objective and step, ``loop.updates_per_batch`` times.

    Args:
        batch: the step's rollouts, siblings next to each other.
        parts: of the run.
        beta: of this step, per nat.
        split_gradient: also measure the KL term's gradient of the first update apart; the update is the same.

    Returns:
        The step's metrics (times excluded) and the scores they come from: those of the policy before its updates.

    Raises:
        DivergenceError: the loss or the gradient is not finite.
    """
    recipe = at_beta(parts.recipe, beta)
    with parts.timers.phase("score"):
        scores = parts.trainer.score(batch)
    metrics = _described(batch, scores, recipe)
    _check_finite(metrics, "the scores of this step's rollouts")
    advantages = task_advantages(batch, recipe)
    updates = []
    for number, rows in enumerate(_shares(batch.tokens.shape[0], recipe.loop.updates_per_batch)):
        mine, known = batch.rows(rows), scores.rows(rows)
        current = None
        if number > 0 and needs_current_scores(recipe):
            with parts.timers.phase("score"):
                current = parts.trainer.score(mine)
        update = assemble(mine, known, recipe, advantages=advantages[rows], current=current)
        with parts.timers.phase("train"):
            updates.append(_update(parts, update, recipe, split=split_gradient and number == 0))
    return metrics | _averaged(updates), scores


def _check_finite(metrics: Mapping[str, float], where: str) -> None:
    """Before anything is made of them: what was saved and what the engine holds stays as it is.

    Raises:
        WorkError: one is not finite.
    """
    broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise DivergenceError(
            f"not finite in {where}: {', '.join(broken)}. Nothing of this step was saved or given to the engine. "
            "Look in metrics.jsonl for where grad/norm, kl/exact or the rewards began to run away; then --resume from "
            "the last checkpoint with a smaller optimizer.lr or a tighter optimizer.clip_grad"
        )


def _shares(rows: int, updates: int) -> Iterator[slice]:
    """Equal shares of whole groups: the recipe's rules see to that."""
    share = rows // updates
    return (slice(start, start + share) for start in range(0, rows, share))


def _described(batch: RolloutBatch, scores: TokenScores, recipe: Recipe) -> dict[str, float]:
    metrics = step_metrics.of_scores(batch, scores, log_ratio_clamp=recipe.kl.log_ratio_clamp)
    metrics |= {"kl/beta": recipe.kl.beta}
    metrics |= step_metrics.of_kl_ratios(batch, scores, recipe.kl)
    shaped = shaped_rewards(batch, recipe)
    if shaped is not batch.rewards:
        metrics["reward/length_penalty"] = float((shaped - batch.rewards).mean())
    weights = mismatch_weights(batch, scores, recipe)
    return metrics if weights is None else metrics | step_metrics.of_mismatch(weights)


def _update(parts: Parts, batch: TrainBatch, recipe: Recipe, *, split: bool) -> dict[str, float]:
    loss = policy_loss(recipe, batch)
    if split:
        found = parts.trainer.split_gradient(batch, loss)
        metrics = {"grad/kl_norm": found.kl_norm, "grad/policy_kl_cosine": found.cosine}
    else:
        found, metrics = parts.trainer.forward_backward(batch, loss), {}
    metrics |= {"policy/loss": found.loss, **found.metrics}
    _check_finite(metrics, f"update {parts.trainer.step + 1}")
    update = parts.trainer.optim_step()
    metrics |= {"grad/norm": update.grad_norm, "policy/lr": update.lr}
    _check_finite(metrics, f"update {parts.trainer.step}")
    return metrics


def _averaged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the updates of a step that have a metric."""
    names = dict.fromkeys(name for update in updates for name in update)
    return {name: fmean(update[name] for update in updates if name in update) for name in names}
