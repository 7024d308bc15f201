"""``klrl check``: checks of the real engines, on the recipe's own model and layout."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.preparation import announce, prepare
from megatron_klrl.cli.rank import rank_place, run_as_rank
from megatron_klrl.cli.reporting import errors_reported, tell
from megatron_klrl.cli.run_dir import CONFIG_FILE, prepare_run_dir
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.prompt_lengths import longest_prompt
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import validate
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.local import run_ranks

if TYPE_CHECKING:
    from megatron_klrl.diagnostics.report import Report

app = typer.Typer(help="Checks of the real engines on a recipe's model.", no_args_is_help=True)

_PIPED_WIDTH = 160
_COLOURS = {"holds": "green", "does not hold": "red", "reported": "yellow"}


@app.callback()
def _group() -> None:
    """Checks of the real engines on a recipe's model."""


@app.command()
def gradient(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    batches: Annotated[
        int, typer.Option("--batches", min=4, help="Batches of the recipe's size for gradient and for descent each.")
    ] = 16,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Probe the KL term on the real model: there, linear in beta, and lowering the exact KL along its negative.

    Example: klrl check gradient examples/recipes/arithmetic_cpu.yaml kl.estimator=exact kl.placement=both
    """
    with errors_reported(traceback=traceback):

        def report(resolved: Recipe) -> "Report":
            from megatron_klrl.jobs import check_gradient_rank

            return check_gradient_rank(resolved, batches=batches, as_json=as_json)

        job = _Job(name="gradient", options=("--batches", str(batches)), check=_check_gradient, report=report)
        _run(job, recipe, overrides or (), as_json=as_json, traceback=traceback)


@app.command()
def sync(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Prove the engine's weights to be the trainer's after a refit: bits of all tensors, and log-probabilities.

    Example: klrl check sync examples/recipes/arithmetic_cpu.yaml parallel.tensor=1 launch.ranks=2
    """
    with errors_reported(traceback=traceback):

        def report(resolved: Recipe) -> "Report":
            from megatron_klrl.jobs import check_sync_rank

            return check_sync_rank(resolved, as_json=as_json)

        job = _Job(name="sync", report=report)
        _run(job, recipe, overrides or (), as_json=as_json, traceback=traceback)


@app.command()
def layout(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    layouts: Annotated[
        str,
        typer.Option("--layouts", help="Comma-separated: tp2, pp2vp2, tp2sp, cp2-packed, ... [default: one of each]"),
    ] = "",
    sequences: Annotated[int, typer.Option("--sequences", min=2, help="Rollouts of the update, at least.")] = 16,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Prove scores, loss, policy gradient and KL gradient of the same rollouts equal to one rank's, in float32.

    Example: klrl check layout examples/recipes/arithmetic_cpu.yaml --layouts tp2,pp2,tp2pp2,cp2-packed
    """
    with errors_reported(traceback=traceback):
        if rank_place() is not None:
            fix = "start it without torchrun or srun: it starts the ranks of each layout itself"
            raise UserError("does not run under a launcher", field="klrl check layout", fix=fix)
        from megatron_klrl.diagnostics.layouts import ONE_RANK, default_layouts, named_layout

        loaded = load_recipe(recipe, overrides or ())
        shape = describe_model(loaded.model.path)
        longest = longest_prompt(loaded.data.train) + loaded.generation.max_tokens
        base = named_layout(ONE_RANK, loaded, longest_row=longest)
        validate(base.recipe, base.ranks)
        asked = [name.strip() for name in layouts.split(",")] if layouts else default_layouts(shape)
        chosen = []
        for named in (named_layout(name, loaded, longest_row=longest) for name in asked):
            try:
                validate(named.recipe, named.ranks)
                chosen.append(named)
            except UserError as error:
                if layouts:
                    raise
                tell(f"left out {named.name}: {error.problem}")
        tell(f"klrl check layout: {recipe.stem}: {', '.join(named.name for named in chosen)} against one rank, float32")
        from megatron_klrl.jobs import check_layouts

        report = check_layouts(loaded, chosen, base, sequences=sequences, as_json=as_json)
        _conclude(report, prints=True, as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A check that runs in the ranks of the recipe.

    Attributes:
        name: of the command.
        options: its own, for the ranks that this process starts.
        check: refuses recipes before anything starts.
        report: what every rank does.
    """

    name: str
    report: Callable[[Recipe], "Report"]
    options: tuple[str, ...] = ()
    check: Callable[[Recipe], None] | None = None


def _run(job: _Job, recipe: Path, overrides: Sequence[str], *, as_json: bool, traceback: bool) -> None:
    """Do a check as the rank this process is, or in the ranks that it starts."""
    place = rank_place()

    def work(resolved: Recipe) -> None:
        _conclude(job.report(resolved), prints=place is None or place.rank == 0, as_json=as_json)

    if place is not None and place.run_dir is not None:
        resolved = load_recipe(place.run_dir / CONFIG_FILE)
        run_as_rank(lambda: work(resolved), place=place, run_dir=place.run_dir, traceback=traceback)
        return
    preparation = prepare(recipe, overrides, place=place)
    if job.check is not None:
        job.check(preparation.recipe)
    if place is None or place.rank == 0:
        announce(f"check {job.name}", preparation, target=preparation.recipe.model.path, to_stderr=as_json)
    if place is not None:
        run_as_rank(lambda: work(preparation.recipe), place=place, run_dir=None, traceback=traceback)
        return
    options = [*job.options, *_flags(as_json=as_json, traceback=traceback)]
    _here_or_in_ranks(["check", job.name], options, preparation.recipe, ranks=preparation.world_size, work=work)


def _check_gradient(recipe: Recipe) -> None:
    if recipe.kl.beta == 0:
        raise UserError("is 0: there is no KL term to check", field="kl.beta", fix="set kl.beta above 0")
    if recipe.precision.fp8_primary_weights:
        problem = "is true: this check moves weights by less than 8 bits can show"
        fix = "set precision.fp8_primary_weights=false for it"
        raise UserError(problem, field="precision.fp8_primary_weights", fix=fix)


def _flags(*, as_json: bool, traceback: bool) -> list[str]:
    return [*(["--json"] if as_json else []), *(["--traceback"] if traceback else [])]


def _here_or_in_ranks(
    command: list[str], options: list[str], recipe: Recipe, *, ranks: int, work: Callable[[Recipe], None]
) -> None:
    """In this process when one rank is enough, else in ranks on this machine, whose folder goes when they are done."""
    if ranks == 1:
        work(recipe)
        return
    folder = Path(tempfile.mkdtemp(prefix=f"klrl-{'-'.join(command)}-"))
    prepare_run_dir(folder, recipe, resume=False)
    code = run_ranks([*command, str(folder / CONFIG_FILE), *options], ranks, folder, report=tell)
    if code == 0:
        shutil.rmtree(folder)
    else:
        tell(f"output of the ranks: {folder}")
    raise typer.Exit(code)


def _conclude(report: "Report", *, prints: bool, as_json: bool) -> None:
    """Print the report, and fail where a check does."""
    if prints:
        typer.echo(_json(report)) if as_json else _print_table(report)
    if not report.holds:
        raise WorkError(f"does not hold: {'; '.join(report.failures)}")


def _json(report: "Report") -> str:
    checks = [
        {
            "check": check.name,
            "found": check.found,
            "wanted": check.wanted,
            "verdict": str(check.verdict),
            "numbers": {name: value if math.isfinite(value) else None for name, value in check.numbers.items()},
        }
        for check in report.checks
    ]
    whole = {"subject": report.subject, **report.facts, "holds": report.holds, "checks": checks}
    return json.dumps(whole, indent=2)


def _print_table(report: "Report") -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    console.print(report.subject)
    console.print("   ".join(f"{name} {_short(value)}" for name, value in report.facts.items()))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("check", "found", "wanted", "verdict"):
        table.add_column(title)
    for check in report.checks:
        colour = _COLOURS[check.verdict]
        table.add_row(check.name, check.found, check.wanted, f"[{colour}]{check.verdict}[/]")
    console.print(table)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
