"""What train and eval do before any engine starts: read the recipe, look at the model, decide the ranks, check."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from megatron_klrl.cli.rank import RankPlace
from megatron_klrl.cli.reporting import tell
from megatron_klrl.config.describe import kl_text, kl_verdict, layout_text
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.model_folder import ModelShape, describe_model
from megatron_klrl.config.precision import check_precision, wants_capability
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import check_memory, validate
from megatron_klrl.errors import UserError
from megatron_klrl.launch.devices import capabilities, decide_ranks, visible_gpus
from megatron_klrl.metrics.names import known
from megatron_klrl.planning import render
from megatron_klrl.planning.hardware import PRESETS
from megatron_klrl.planning.layout import of_recipe
from megatron_klrl.planning.memory import PhaseMemory
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import plan, request
from megatron_klrl.tasks.sources import check_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """A checked run that has not started.

    Attributes:
        name: of the recipe: its file name without suffix.
        recipe: resolved.
        shape: of its model.
        world_size: ranks of the job.
        warnings: what the rules found worth saying.
    """

    name: str
    recipe: Recipe
    shape: ModelShape
    world_size: int
    warnings: list[str]

    @property
    def data_parallel(self) -> int:
        """Copies of the trained model."""
        return self.world_size // self.recipe.parallel.ranks_per_replica


def prepare(recipe_path: Path, overrides: Sequence[str], *, place: RankPlace | None) -> Preparation:
    """Read and check a recipe for the ranks there are, or will be.

    Raises:
        UserError: anything wrong with the recipe, its model, its files or the number of ranks.
    """
    recipe = load_recipe(recipe_path, overrides)
    shape = describe_model(recipe.model.path)
    world_size, warnings = check(recipe, place=place)
    return Preparation(name=recipe_path.stem, recipe=recipe, shape=shape, world_size=world_size, warnings=warnings)


def prepare_elsewhere(recipe_path: Path, overrides: Sequence[str], *, world_size: int, gpus: int) -> Preparation:
    """Read and check a recipe for ranks on other machines.

    Args:
        recipe_path: YAML file.
        overrides: of the command line.
        world_size: ranks there.
        gpus: of one machine there.

    Raises:
        UserError: anything wrong with the recipe, its model, its files or the number of ranks.
    """
    recipe = load_recipe(recipe_path, overrides)
    shape = describe_model(recipe.model.path)
    warnings = _check_for(recipe, world_size=world_size, gpus=gpus)
    return Preparation(name=recipe_path.stem, recipe=recipe, shape=shape, world_size=world_size, warnings=warnings)


def check(recipe: Recipe, *, place: RankPlace | None) -> tuple[int, list[str]]:
    """Check a resolved recipe for the ranks there are, or will be; how many, and warnings.

    Raises:
        UserError: anything wrong with the recipe, its model, its files or the number of ranks.
    """
    wants_gpu = recipe.generation.sleep or recipe.memory.offload_while_generating
    gpus = visible_gpus() if place is None or wants_gpu else 0
    world_size = decide_ranks(recipe, gpus=gpus) if place is None else place.world_size
    return world_size, _check_for(recipe, world_size=world_size, gpus=gpus)


def _check_for(recipe: Recipe, *, world_size: int, gpus: int) -> list[str]:
    warnings = validate(recipe, world_size)
    check_memory(recipe, gpus=gpus)
    check_precision(recipe, capabilities() if wants_capability(recipe) else ())
    _check_known_metric(recipe.checkpoint.keep_best)
    return warnings + check_data(recipe)


def _check_known_metric(name: str | None) -> None:
    if name is not None and not known(name):
        fix = "name one of docs/reference/metrics.md"
        raise UserError(f"there is no metric {name}", field="checkpoint.keep_best", fix=fix)


def announce(command: str, preparation: Preparation, *, target: str, to_stderr: bool) -> None:
    """The first line of a run, within a second of the start, and the warnings."""
    layout = layout_text(preparation.recipe, world_size=preparation.world_size)
    text = f"klrl {command}: {preparation.name}: {layout}, KL: {kl_text(preparation.recipe)} -> {target}"
    typer.echo(text, err=to_stderr)
    for warning in preparation.warnings:
        tell(f"warning: {warning}")


def plan_as_dict(preparation: Preparation, *, run_dir: Path) -> dict[str, object]:
    """The dry run for machines."""
    memory = _memory(preparation)
    parallel = preparation.recipe.parallel
    return {
        "name": preparation.name,
        "run_dir": str(run_dir),
        "layout": {
            "ranks": preparation.world_size,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "expert": parallel.expert,
            "data": preparation.data_parallel,
        },
        "kl": {"text": kl_text(preparation.recipe), "verdict": kl_verdict(preparation.recipe)},
        "memory_estimate": {
            "parameters": preparation.shape.parameters,
            "phases": {phase.name: {**phase.parts, "total": phase.total} for phase in memory},
        },
        "warnings": preparation.warnings,
        "config": preparation.recipe.model_dump(mode="json"),
    }


def memory_text(preparation: Preparation) -> str:
    """The memory estimate as lines."""
    head = f"tensors of one rank, an estimate ({preparation.shape.parameters:,} parameters; klrl plan: times, layouts):"
    return "\n".join([head, *render.memory_lines(_memory(preparation))])


def _memory(preparation: Preparation) -> list[PhaseMemory]:
    hardware = PRESETS["h200"] if visible_gpus() else None  # memory does not depend on which
    wanted = request(preparation.recipe, read_model(preparation.recipe.model.path), hardware=hardware)
    return plan(wanted, of_recipe(preparation.recipe, gpus=preparation.world_size)).memory
