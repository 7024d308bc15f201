"""Accuracy of the current policy on the evaluation sets."""

import statistics

from megatron_klrl.loop.parts import EvalTask, Parts
from megatron_klrl.loop.rollout import rollouts


def evaluate(parts: Parts) -> dict[str, float]:
    """``eval/<name>/accuracy`` and ``eval/<name>/stderr`` of every set, sampled from the engine's current weights.

    The same prompts and seeds each time, so that differences between evaluations are the policy's.
    """
    found: dict[str, float] = {}
    for name, spec in parts.evaluation.items():
        accuracy, stderr = accuracy_of(parts, name, spec)
        found |= {f"eval/{name}/accuracy": accuracy, f"eval/{name}/stderr": stderr}
    return found


def accuracy_of(parts: Parts, name: str, spec: EvalTask) -> tuple[float, float]:
    """Mean reward over prompts and samples, and its standard error with prompts as the independent units."""
    prompts = spec.task.prompts(0, spec.prompts)
    sampled = rollouts(
        parts, spec.task, prompts, samples=spec.samples, temperature=spec.temperature, purpose=("evaluation", name)
    )
    per_prompt = [
        statistics.fmean(sampled.rewards[start : start + spec.samples])
        for start in range(0, len(sampled.rewards), spec.samples)
    ]
    stderr = statistics.stdev(per_prompt) / len(per_prompt) ** 0.5 if len(per_prompt) > 1 else float("nan")
    return statistics.fmean(per_prompt), stderr
