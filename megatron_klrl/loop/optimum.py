"""What the run reached beside the optimum of its objective (`closed_form`).

The success rates of the reference are estimated from samples taken before the first update, when the policy is the
reference. With kl.beta 0, which has no unique optimum, the report says what was reached and at which distance.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klrl.batch import RolloutBatch
from megatron_klrl.loop.closed_form import Point, optimal_point
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.rollout import Rollouts, collate, rollouts
from megatron_klrl.metrics.step import per_sequence

_PROMPTS_START = 10_000_000  # far behind what training draws from the same stream


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumReport:
    """Start, end and optimum on the same prompts.

    Attributes:
        beta: reward per nat.
        start: the reference (KL 0).
        reached: the policy at the end; its KL is the full-vocabulary one on its own samples.
        optimal: closed form, from the reference's success rates; None at beta 0.
        reference_rates: those rates, prompt by prompt.
        unsolved: prompts that no reference sample solved; the estimate holds their optimum at accuracy 0.
        prompts: how many.
        samples: of each.
    """

    beta: float
    start: Point
    reached: Point
    optimal: Point | None
    reference_rates: tuple[float, ...]
    unsolved: int
    prompts: int
    samples: int


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
        optimal=optimal_point(reference_rates, beta=beta) if beta > 0 else None,
        reference_rates=tuple(reference_rates),
        unsolved=sum(rate == 0 for rate in reference_rates),
        prompts=spec.prompts,
        samples=spec.samples,
    )


def _exact_kl(parts: Parts, batch: RolloutBatch) -> float:
    scores = parts.trainer.score(batch)
    if scores.full_kl is None:
        raise ValueError("the optimum report needs a reference: kl.beta > 0 or reference.measure")
    return per_sequence(scores.full_kl, batch.response_mask)
