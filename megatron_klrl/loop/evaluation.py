"""Rewards of the current policy on the evaluation sets."""

import statistics
from dataclasses import dataclass

from megatron_klrl.loop.parts import EvalTask, Parts
from megatron_klrl.loop.rollout import rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRewards:
    """What was found on one set.

    Attributes:
        rewards: of each prompt's samples, prompt by prompt.
        verifier_timeouts: verifications that took too long.
        verifier_errors: verifications that failed.
    """

    rewards: list[list[float]]
    verifier_timeouts: int
    verifier_errors: int


def evaluate(parts: Parts) -> dict[str, float]:
    """``eval/<name>/accuracy`` and ``eval/<name>/stderr`` of every set, sampled from the engine's current weights.

    The same prompts and seeds each time, so that differences between evaluations are the policy's.
    """
    found: dict[str, float] = {}
    for name, spec in parts.evaluation.items():
        per_prompt = [statistics.fmean(rewards) for rewards in sample_set(parts, name, spec).rewards]
        stderr = statistics.stdev(per_prompt) / len(per_prompt) ** 0.5 if len(per_prompt) > 1 else float("nan")
        found |= {f"eval/{name}/accuracy": statistics.fmean(per_prompt), f"eval/{name}/stderr": stderr}
    return found


def sample_set(parts: Parts, name: str, spec: EvalTask) -> SetRewards:
    """Sample and verify one set; collective."""
    prompts = spec.task.prompts(0, spec.prompts)
    sampled = rollouts(
        parts, spec.task, prompts, samples=spec.samples, temperature=spec.temperature, purpose=("evaluation", name)
    )
    starts = range(0, len(sampled.rewards), spec.samples)
    return SetRewards(
        rewards=[sampled.rewards[start : start + spec.samples] for start in starts],
        verifier_timeouts=sampled.verifier_timeouts,
        verifier_errors=sampled.verifier_errors,
    )
