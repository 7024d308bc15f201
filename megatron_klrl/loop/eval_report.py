"""The report of ``klrl eval``: what was evaluated, on what, and how well it did."""

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.config.load import dump_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import WorkError
from megatron_klrl.loop.evaluation import SetRewards, sample_set
from megatron_klrl.loop.parts import Parts
from megatron_klrl.metrics.pass_at_k import Estimate, over_prompts, pass_at_k, powers_of_two

_SOLVED = 1.0  # a sample with this reward or more solves its prompt; a user's reward may be anything


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """One evaluation set.

    Attributes:
        mean: reward.
        pass_at: pass@k by k.
        found: what it was computed from.
        out_of_distribution: as the recipe says.
        temperature: of sampling.
    """

    mean: Estimate
    pass_at: Mapping[int, Estimate]
    found: SetRewards
    out_of_distribution: bool
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """A whole evaluation.

    Attributes:
        source: checkpoint or Hugging Face folder.
        weights_sha256: of the weights, by name, whatever the layout and the format they were stored in.
        recipe_sha256: of the resolved recipe.
        sets: by name.
    """

    source: str
    weights_sha256: str
    recipe_sha256: str
    sets: Mapping[str, SetReport]


def evaluate_all(parts: Parts, *, source: str) -> EvalReport:
    """Sample every set from the engine's weights, which are the trainer's; collective.

    Args:
        parts: of a run.
        source: where the weights are from, for the report.
    """
    specs = parts.recipe.data.eval
    return EvalReport(
        source=source,
        weights_sha256=weights_sha256(parts.trainer.weight_checksums()),
        recipe_sha256=recipe_sha256(parts.recipe),
        sets={
            name: report_set(
                sample_set(parts, name, task),
                out_of_distribution=specs[name].out_of_distribution,
                temperature=task.temperature,
            )
            for name, task in parts.evaluation.items()
        },
    )


def report_set(found: SetRewards, *, out_of_distribution: bool, temperature: float) -> SetReport:
    """Mean and pass@k of one set."""
    samples = len(found.rewards[0])
    solved = [sum(reward >= _SOLVED for reward in rewards) for rewards in found.rewards]
    return SetReport(
        mean=over_prompts([statistics.fmean(rewards) for rewards in found.rewards]),
        pass_at={k: over_prompts([pass_at_k(samples, right, k) for right in solved]) for k in powers_of_two(samples)},
        found=found,
        out_of_distribution=out_of_distribution,
        temperature=temperature,
    )


def recipe_sha256(recipe: Recipe) -> str:
    """Of the resolved recipe, defaults included."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()


def weights_sha256(checksums: Mapping[str, str]) -> str:
    """Of the checksums of all tensors, in the order of their names."""
    return hashlib.sha256(json.dumps(dict(sorted(checksums.items()))).encode()).hexdigest()


def as_json(report: EvalReport) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "source": report.source,
        "weights_sha256": report.weights_sha256,
        "recipe_sha256": report.recipe_sha256,
        "sets": {name: _set_as_json(one) for name, one in report.sets.items()},
    }


def _set_as_json(one: SetReport) -> dict[str, Any]:
    return {
        "accuracy": one.mean.value,
        "interval_95": one.mean.interval_95,
        "pass_at_k": {
            str(k): {"value": found.value, "interval_95": found.interval_95} for k, found in one.pass_at.items()
        },
        "out_of_distribution": one.out_of_distribution,
        "prompts": len(one.found.rewards),
        "samples": len(one.found.rewards[0]),
        "temperature": one.temperature,
        "verifier_timeouts": one.found.verifier_timeouts,
        "verifier_errors": one.found.verifier_errors,
    }


def table(report: EvalReport) -> list[str]:
    """Lines for the terminal: sets in distribution first."""
    ks = sorted({k for one in report.sets.values() for k in one.pass_at})
    rows = [["set", "distribution", "prompts", "mean reward", *(f"pass@{k}" for k in ks)]]
    for name, one in sorted(report.sets.items(), key=lambda item: item[1].out_of_distribution):
        distribution = "out" if one.out_of_distribution else "in"
        size = f"{len(one.found.rewards)} x {len(one.found.rewards[0])}"
        cells = [_cell(one.mean), *(_cell(one.pass_at.get(k)) for k in ks)]
        rows.append([name, distribution, size, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, one in report.sets.items():
        if one.found.verifier_timeouts or one.found.verifier_errors:
            timeouts, errors = one.found.verifier_timeouts, one.found.verifier_errors
            lines.append(f"{name}: {timeouts} verifications took too long and {errors} failed; they count as 0")
    return [*lines, "in brackets: 95 % interval over prompts", f"weights {report.weights_sha256[:16]}: {report.source}"]


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.interval_95 is None:
        return f"{estimate.value:.3f}"
    low, high = estimate.interval_95
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def write_beside(weights: Path, report: EvalReport) -> Path:
    """Write `<weights>.eval-<recipe>.json` beside a checkpoint or folder, one file for each recipe that looked at it.

    Raises:
        WorkError: the folder above cannot be written to.
    """
    weights = weights.resolve()
    file = weights.with_name(f"{weights.name}.eval-{report.recipe_sha256[:8]}.json")
    try:
        file.write_text(json.dumps(as_json(report), indent=2) + "\n")
    except OSError as error:
        raise WorkError(f"the evaluation is done, but {file} cannot be written: {error.strerror}") from error
    return file
