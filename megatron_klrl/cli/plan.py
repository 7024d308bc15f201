"""``klrl plan``: memory per rank and phase, layouts that fit, and the expected bottleneck; starts nothing."""

import json
from typing import Annotated

import typer

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.config.load import load_recipe
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.planning import render
from megatron_klrl.planning.hardware import PRESETS, choose
from megatron_klrl.planning.layout import of_recipe
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import LayoutPlan, Request, fitting, least, plan, request

_SHOWN = 15


def plan_run(  # noqa: PLR0913  each is an option of the command
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of the job.", min=1, show_default=False)] = ...,  # type: ignore[assignment]
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option("--gpu-memory-gib", help="Memory of one GPU.", min=0.1, show_default="the preset's"),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help=f"Kind of GPU: {', '.join(PRESETS)}.")] = "h200",
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="FIELD=NUMBER", help="Replace a number of the preset.", show_default=False),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Of a prompt.", min=1, show_default="as far as known")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option("--response-tokens", help="Of a response, on average.", min=1, show_default="longest")
    ] = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="List the layouts that fit, quickest first.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Memory per rank and phase, whether it fits, time and bottleneck; only the model's config.json is read.

    Example: klrl plan examples/recipes/math_qwen2.5_7b.yaml model.path=DIR --gpus 8 --gpu-memory-gib 131 --layouts
    """
    with errors_reported(traceback=traceback):
        settings = load_recipe(recipe, overrides or ())
        hardware = choose(gpu, assume or ())
        wanted = request(
            settings,
            read_model(settings.model.path),
            hardware=hardware,
            prompt=prompt_tokens,
            response=response_tokens,
        )
        memory_bytes = round((gpu_memory_gib or hardware.memory_gib) * 2**30)
        if layouts:
            _layouts(wanted, gpus=gpus, memory_bytes=memory_bytes, as_json=as_json)
        else:
            _one(wanted, plan(wanted, of_recipe(settings, gpus=gpus)), memory_bytes=memory_bytes, as_json=as_json)


def _one(wanted: Request, found: LayoutPlan, *, memory_bytes: int, as_json: bool) -> None:
    fits = found.peak.total + render.HEADROOM_BYTES <= memory_bytes
    if as_json:
        data = render.request_data(wanted) | render.as_data(found) | {"gpu_memory_bytes": memory_bytes, "fits": fits}
        typer.echo(json.dumps(data, indent=2))
        return
    lines = [
        render.model_line(wanted.model),
        f"layout: {found.layout.text()} on {found.layout.gpus} GPUs; a rank of stage {found.stage} needs most",
        *_work_and_assumptions(wanted),
        *render.memory_lines(found.memory),
        render.fit_line(found, memory_bytes),
        *render.host_lines(found, wanted.hardware),
        *render.time_lines(found, wanted.work),
    ]
    typer.echo("\n".join(lines))


def _layouts(wanted: Request, *, gpus: int, memory_bytes: int, as_json: bool) -> None:
    found = fitting(wanted, gpus=gpus, memory_bytes=memory_bytes)
    if as_json:
        data = render.request_data(wanted) | {
            "gpus": gpus,
            "gpu_memory_bytes": memory_bytes,
            "fitting": len(found),
            "layouts": [render.as_data(one) for one in found[:_SHOWN]],
        }
        typer.echo(json.dumps(data, indent=2))
    if not found:
        raise _nothing_fits(wanted, gpus=gpus, memory_bytes=memory_bytes)
    if not as_json:
        lines = [
            render.model_line(wanted.model),
            *_work_and_assumptions(wanted),
            *render.layout_lines(found, most=_SHOWN),
        ]
        typer.echo("\n".join(lines))


def _nothing_fits(wanted: Request, *, gpus: int, memory_bytes: int) -> Exception:
    nearest = least(wanted, gpus=gpus)
    if nearest is None:
        return UserError(f"no layout divides {gpus} GPUs", field="--gpus", fix="give another number")
    return WorkError(
        f"no layout fits {gpus} GPUs of {memory_bytes / 2**30:.1f} GiB; the one that needs least is "
        f"{nearest.layout.text()} with {nearest.peak.total / 2**30:.1f} GiB in {nearest.peak.name}. More GPUs, smaller "
        "microbatches (loop.micro_batch_size), generation.sleep=true or memory.offload_while_generating=true need less"
    )


def _work_and_assumptions(wanted: Request) -> list[str]:
    work = wanted.work
    lines = [
        f"a step: {work.sequences} sequences of {work.prompt} + {work.response} tokens",
    ]
    return lines if wanted.hardware is None else [*lines, render.hardware_line(wanted.hardware)]
