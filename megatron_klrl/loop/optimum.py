"""The optimum of the objective in closed form, beside what the run reached.

For a 0/1 reward the maximiser of E[R] - beta KL(policy || reference) is ref * exp(R / beta) / Z, so a prompt that the
reference answers with probability p has

    J* = beta log(1 - p + p e^{1/beta})
    accuracy* = p e^{1/beta} / (1 - p + p e^{1/beta})
    KL* = (accuracy* - J*) / beta

p is estimated from reference samples, taken before the first update, when the policy is the reference.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klrl.batch import RolloutBatch
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.rollout import Rollouts, collate, rollouts
from megatron_klrl.metrics.step import per_sequence

_PROMPTS_START = 10_000_000  # far behind what training draws from the same stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a policy stands.

    Attributes:
        accuracy: mean 0/1 reward.
        kl: KL(policy || reference), nats per sequence.
        objective: accuracy - beta * kl.
    """

    accuracy: float
    kl: float
    objective: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumReport:
    """Start, end and optimum on the same prompts.

    Attributes:
        beta: reward per nat.
        start: the reference (KL 0).
        reached: the policy at the end; its KL is the full-vocabulary one on its own samples.
        optimal: closed form, from the reference's success rates.
        unsolved: prompts that no reference sample solved; the estimate holds their optimum at accuracy 0.
        prompts: how many.
        samples: of each.
    """

    beta: float
    start: Point
    reached: Point
    optimal: Point
    unsolved: int
    prompts: int
    samples: int


def optimal_point(success_rates: Sequence[float], *, beta: float) -> Point:
    """The closed form, averaged over prompts; computed in logarithms, so that a small beta does not overflow.

    Raises:
        ValueError: beta is not positive: without a KL the optimum is not unique.
    """
    if beta <= 0:
        raise ValueError("the closed-form optimum needs beta > 0")
    accuracies, objectives = [], []
    for rate in success_rates:
        failed = math.log1p(-rate) if rate < 1 else -math.inf
        solved = math.log(rate) + 1 / beta if rate > 0 else -math.inf
        top = max(failed, solved)
        log_z = top + math.log(math.exp(failed - top) + math.exp(solved - top))
        accuracies.append(math.exp(solved - log_z))
        objectives.append(beta * log_z)
    accuracy, objective = statistics.fmean(accuracies), statistics.fmean(objectives)
    return Point(accuracy=accuracy, kl=(accuracy - objective) / beta, objective=objective)


def sample_for_optimum(parts: Parts) -> Rollouts:
    """Completions of the optimum's prompts from the engine's current weights; the same prompts and seeds each time."""
    spec = parts.recipe.optimum
    prompts = parts.task.prompts(_PROMPTS_START, spec.prompts)
    temperature = parts.recipe.generation.temperature
    return rollouts(parts, parts.task, prompts, samples=spec.samples, temperature=temperature, purpose=("optimum",))


def success_rates(sampled: Rollouts, *, samples: int) -> list[float]:
    """Share of rewarded completions of each prompt."""
    return [
        statistics.fmean(sampled.rewards[start : start + samples]) for start in range(0, len(sampled.rewards), samples)
    ]


def report(parts: Parts, *, reference_rates: Sequence[float]) -> OptimumReport:
    """Measure the current policy on the optimum's prompts and set it beside the optimum."""
    spec, beta = parts.recipe.optimum, parts.recipe.kl.beta
    sampled = sample_for_optimum(parts)
    batch = collate(sampled, device=parts.world.device)
    accuracy, kl = float(batch.rewards.mean()), _exact_kl(parts, batch)
    start = statistics.fmean(reference_rates)
    return OptimumReport(
        beta=beta,
        start=Point(accuracy=start, kl=0.0, objective=start),
        reached=Point(accuracy=accuracy, kl=kl, objective=accuracy - beta * kl),
        optimal=optimal_point(reference_rates, beta=beta),
        unsolved=sum(rate == 0 for rate in reference_rates),
        prompts=spec.prompts,
        samples=spec.samples,
    )


def _exact_kl(parts: Parts, batch: RolloutBatch) -> float:
    scores = parts.trainer.score(batch)
    if scores.full_kl is None:
        raise ValueError("the optimum report needs a reference: kl.beta > 0")
    return per_sequence(scores.full_kl, batch.response_mask)
