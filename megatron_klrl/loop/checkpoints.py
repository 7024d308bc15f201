"""A run's checkpoints: what belongs to one, where it lies, and which is complete."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_klrl.errors import UserError

_STATE, _RECIPE = "state.json", "recipe.yaml"
WAITING = "rollouts.safetensors"
"""Rollouts that were sampled ahead of their step."""
REFERENCE = "reference"
"""Folder of a reference that is no longer the one it was loaded from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs to go on, besides tensors. Seeds follow from the step.

    Attributes:
        step: finished steps.
        weight_version: of the policy.
        updates: optimizer steps taken.
        next_prompt: place in the stream of training prompts.
        beta_learnt: what the rule for beta has learnt; None where it learns nothing.
        reference_step: step after which the reference was last changed; 0: it is as it was loaded.
        reference_checksum: of the reference's weights; empty without a reference.
        reference_rates: success rates of the reference on the optimum's prompts.
    """

    step: int
    weight_version: int
    updates: int = 0
    next_prompt: int = 0
    beta_learnt: float | None = None
    reference_step: int = 0
    reference_checksum: str = ""
    reference_rates: tuple[float, ...] = ()


def save(root: Path, state: RunState, recipe_text: str, write_tensors: Callable[[Path], None]) -> Path:
    """Write a checkpoint under a temporary name and move it; collective. The state file is written last.

    Args:
        root: the run's checkpoints folder.
        state: to store.
        recipe_text: resolved recipe, so that a checkpoint can be exported by itself.
        write_tensors: writes everything else into an existing, empty folder; collective.
    """
    final, partial = root / f"step_{state.step:06d}", root / f".writing_{state.step:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    write_tensors(partial)
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / _RECIPE).write_text(recipe_text)
        (partial / _STATE).write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()
    return final


def newest(root: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    complete = sorted(folder for folder in root.glob("step_*") if (folder / _STATE).exists())
    if not complete:
        raise UserError(f"no complete checkpoint in {root}", field="--resume", fix="start the run without --resume")
    return complete[-1]


def read_state(folder: Path) -> RunState:
    """The state stored with a checkpoint.

    Raises:
        UserError: the folder is not a complete checkpoint.
    """
    try:
        stored = json.loads((folder / _STATE).read_text())
        stored["reference_rates"] = tuple(stored["reference_rates"])
        return RunState(**stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint", field="checkpoint", fix="name a step_* folder of a run"
        ) from error


def recipe_file(folder: Path) -> Path:
    """The resolved recipe stored with a checkpoint."""
    read_state(folder)
    return folder / _RECIPE
