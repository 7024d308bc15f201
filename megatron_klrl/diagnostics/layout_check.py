"""Is the update the same in every layout? Scores, loss and gradients of the same rollouts, against one rank.

Everything is taken in float32 through the code that trains. Layouts add the same numbers in another order, so they may
differ by rounding alone: a bound far below anything that could be a mistake, and above rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_klrl.batch import RolloutBatch
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.diagnostics.report import Check, Report, verdict
from megatron_klrl.loop.parts import Parts, TrainEngine
from megatron_klrl.loop.rollout import collate, rollouts
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.losses.policy_loss import kl_part, policy_part
from megatron_klrl.runtime.world import World

BOUND = 1e-5
"""Largest relative difference (L2 norms, of each tensor) that rounding may make in float32."""

_SCORES = "scores"
# Relative noise that moves the policy off its reference, so that there is a KL gradient. Far off: a KL is a difference
# of log-probabilities, and a small one keeps their rounding.
_NOISE, _NOISE_SEED = 0.2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Difference:
    """Between two folders of measurements, in one quantity.

    Attributes:
        worst: relative difference of the tensor that differs most.
        tensor: its name.
        first: name of the first tensor beyond the bound, in the order of the model, and its difference; None if all
            are within.
    """

    worst: float
    tensor: str
    first: tuple[str, float] | None


def sample(parts: Parts, *, sequences: int) -> RolloutBatch:
    """At least ``sequences`` rollouts of the recipe's first training prompts, whole groups."""
    recipe = parts.recipe
    group = recipe.loop.group_size
    prompts = parts.task.prompts(0, -(-sequences // group))
    found = rollouts(
        parts, parts.task, prompts, samples=group, temperature=recipe.generation.temperature, purpose=("layout",)
    )
    return collate(found, device=parts.world.device)


def write_batch(batch: RolloutBatch, file: Path) -> None:
    """Rollouts to a file that every layout reads."""
    save_file({field.name: getattr(batch, field.name).cpu().contiguous() for field in fields(batch)}, file)


def measure(trainer: TrainEngine, recipe: Recipe, world: World, *, rollout_file: Path, to: Path) -> None:
    """Scores, loss and both gradients of an update in this layout, into a folder; collective.

    Args:
        trainer: in the layout, with the weights of the model's folder.
        recipe: says what the update is.
        world: this rank's place.
        rollout_file: from ``write_batch``.
        to: existing folder.
    """
    device = world.device
    batch = RolloutBatch(**{name: tensor.to(device) for name, tensor in load_file(rollout_file).items()})
    trainer.perturb(scale=_NOISE, seed=_NOISE_SEED)
    scores = trainer.score(batch)
    update, loss = assemble(batch, scores, recipe), policy_loss(recipe, batch)
    measured = {
        f"log-probabilities/{field.name}": value
        for field in fields(scores)
        if (value := getattr(scores, field.name)) is not None
    }
    named = {"policy": policy_part} | ({"KL": kl_part} if recipe.kl.beta > 0 else {})
    for name, part in named.items():
        report = trainer.forward_backward(*part(update, loss), keep_whole_gradient=True)
        measured[f"loss/{name}"] = torch.tensor([report.loss])
        gradients = {key: value.cpu().contiguous() for key, value in trainer.export_gradients()}
        if world.is_main:
            save_file(gradients, to / f"{name}.safetensors")
    if world.is_main:
        save_file({name: value.cpu().contiguous() for name, value in measured.items()}, to / f"{_SCORES}.safetensors")


def compare(layouts: Sequence[tuple[str, int, Path]], baseline: Path, *, subject: str) -> Report:
    """Every layout's measurements against those of one rank.

    Args:
        layouts: name, ranks and folder of each.
        baseline: folder of the single rank.
        subject: what was looked at, as a sentence.
    """
    checks = tuple(_check(name, ranks, folder, baseline) for name, ranks, folder in layouts)
    with safe_open(baseline / f"{_SCORES}.safetensors", "pt") as scores:
        rows, width = scores.get_tensor("log-probabilities/old_logprobs").shape
    return Report(subject=subject, facts={"sequences": rows, "width": width, "bound": BOUND}, checks=checks)


def _check(name: str, ranks: int, folder: Path, baseline: Path) -> Check:
    found = {
        "scores and loss": _difference(_tensors(folder, _SCORES), _tensors(baseline, _SCORES)),
        "policy gradient": _difference(_tensors(folder, "policy"), _tensors(baseline, "policy")),
    }
    if (baseline / "KL.safetensors").exists():
        found["KL gradient"] = _difference(_tensors(folder, "KL"), _tensors(baseline, "KL"))
    first = [
        f"{what} first differs in {one.first[0]}, by {one.first[1]:.0e}" for what, one in found.items() if one.first
    ]
    text = first or [f"{what} {one.worst:.0e}" for what, one in found.items()]
    return Check(
        name=f"{name} ({ranks} rank{'s' if ranks > 1 else ''})",
        found=", ".join(text),
        wanted=f"relative differences to one rank below {BOUND:g}",
        verdict=verdict(not first),
        numbers={what: one.worst for what, one in found.items()},
    )


def _difference(found: Iterator[tuple[str, Tensor]], wanted: Iterator[tuple[str, Tensor]]) -> _Difference:
    worst, tensor = 0.0, ""
    first: tuple[str, float] | None = None
    for (name, ours), (expected_name, theirs) in zip(found, wanted, strict=True):
        if name != expected_name:
            raise ValueError(f"{name} stands where {expected_name} should: not the same model")
        gap = float((ours.double() - theirs.double()).norm())
        size = float(theirs.double().norm())
        relative = gap / size if size > 0 else float(gap > 0)
        if not relative <= BOUND and first is None:  # also where it is not a number
            first = name, relative
        if not relative <= worst:
            worst, tensor = relative, name
    return _Difference(worst=worst, tensor=tensor, first=first)


def _tensors(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """One at a time, in the order of the model: layer numbers count, they do not sort as text."""
    with safe_open(folder / f"{name}.safetensors", "pt") as tensors:
        for key in sorted(tensors.keys(), key=_natural):
            yield key, tensors.get_tensor(key)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
