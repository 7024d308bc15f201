"""The plan of a run: its own layout, and all others that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_klrl.config.recipe import Fp8, Recipe
from megatron_klrl.errors import UserError
from megatron_klrl.planning import layout as layouts
from megatron_klrl.planning import work as works
from megatron_klrl.planning.activations import Modules
from megatron_klrl.planning.hardware import Hardware
from megatron_klrl.planning.layout import Layout
from megatron_klrl.planning.memory import PhaseMemory, Stage, phases
from megatron_klrl.planning.model import PlannedModel
from megatron_klrl.planning.timing import PhaseTime, phase_times
from megatron_klrl.planning.work import Work

HEADROOM_BYTES = 3 << 30
"""What a GPU process takes beside tensors, an assumption: context, NCCL's and cuBLAS's workspaces, fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """One layout.

    Attributes:
        layout: the layout.
        stage: the pipeline stage whose rank needs most.
        memory: of that rank, in each phase.
        times: of each phase; empty without hardware.
    """

    layout: Layout
    stage: int
    memory: list[PhaseMemory]
    times: list[PhaseTime]

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.memory, key=lambda phase: phase.total)

    @property
    def host_bytes(self) -> int:
        """What this rank has in pinned memory of its host while the engine generates; 0 unless the recipe offloads."""
        parts = {phase.name: phase.parts for phase in self.memory}
        return parts["train"]["optimizer"] - parts["generate"].get("optimizer", 0)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(phase.seconds for phase in self.times)

    @property
    def slowest(self) -> PhaseTime:
        """The phase that takes longest."""
        return max(self.times, key=lambda phase: phase.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is planned.

    Attributes:
        recipe: resolved.
        model: its model.
        work: of a step.
        modules: what layers are built of.
        hardware: None where no times are wanted.
    """

    recipe: Recipe
    model: PlannedModel
    work: Work
    modules: Modules
    hardware: Hardware | None


def request(
    recipe: Recipe,
    model: PlannedModel,
    *,
    hardware: Hardware | None,
    prompt: int | None = None,
    response: int | None = None,
) -> Request:
    """What to plan for a recipe. Without hardware the run is one on CPU, whose layers are not fused.

    Raises:
        UserError: the GPU has no 8-bit products.
    """
    if hardware is not None and not hardware.fp8_tflops and recipe.precision.fp8 is not Fp8.NONE:
        problem = f"is {recipe.precision.fp8}, but {hardware.name} has no FP8"
        raise UserError(problem, field="precision.fp8", fix="set precision.fp8=none, or another --gpu")
    return Request(
        recipe=recipe,
        model=model,
        work=works.of_recipe(recipe, model, prompt=prompt, response=response),
        modules=Modules.LOCAL if hardware is None else Modules.FUSED,
        hardware=hardware,
    )


def plan(wanted: Request, layout: Layout) -> LayoutPlan:
    """One layout: the rank that needs most, and the times.

    Raises:
        UserError: the layout is not possible.
    """
    refused = layouts.problem(layout, wanted.model)
    if refused is not None:
        raise refused
    return _plan(wanted, layout)


def _plan(wanted: Request, layout: Layout) -> LayoutPlan:
    stage = Stage(model=wanted.model, recipe=wanted.recipe, layout=layout, work=wanted.work, modules=wanted.modules)
    # activations are most on the first stage, logits are on the last
    stages = [replace(stage, number=number) for number in sorted({0, layout.pipeline - 1})]
    found = [phases(one) for one in stages]
    worst = max(range(len(stages)), key=lambda number: max(phase.total for phase in found[number]))
    times = [] if wanted.hardware is None else phase_times(stage, wanted.hardware)
    return LayoutPlan(layout=layout, stage=stages[worst].number, memory=found[worst], times=times)


def fitting(wanted: Request, *, gpus: int, memory_bytes: int) -> list[LayoutPlan]:
    """Every layout that fits, quickest first.

    Args:
        wanted: with hardware.
        gpus: of the job.
        memory_bytes: of one GPU.
    """
    found = [one for one in _all(wanted, gpus) if one.peak.total + HEADROOM_BYTES <= memory_bytes]
    return sorted(found, key=lambda one: (one.seconds, one.peak.total))


def least(wanted: Request, *, gpus: int) -> LayoutPlan | None:
    """The layout that needs least memory; None where none is possible."""
    return min(_all(wanted, gpus), key=lambda one: one.peak.total, default=None)


def _all(wanted: Request, gpus: int) -> Iterator[LayoutPlan]:
    for layout in layouts.candidates(wanted.model, gpus=gpus):
        yield _plan(wanted, layout)
