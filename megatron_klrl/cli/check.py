"""``klrl check``: checks of the real engines, on the recipe's own model and layout."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
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
from megatron_klrl.config.recipe import Recipe
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
        place = rank_place()

        def work(resolved: Recipe) -> None:
            from megatron_klrl.jobs import check_gradient_rank

            report = check_gradient_rank(resolved, batches=batches, as_json=as_json)
            _conclude(report, prints=place is None or place.rank == 0, as_json=as_json)

        if place is not None and place.run_dir is not None:
            resolved = load_recipe(place.run_dir / CONFIG_FILE)
            run_as_rank(lambda: work(resolved), place=place, run_dir=place.run_dir, traceback=traceback)
            return
        preparation = prepare(recipe, overrides or (), place=place)
        _check_has_kl(preparation.recipe)
        if place is None or place.rank == 0:
            announce("check gradient", preparation, target=preparation.recipe.model.path, to_stderr=as_json)
        if place is not None:
            run_as_rank(lambda: work(preparation.recipe), place=place, run_dir=None, traceback=traceback)
            return
        options = ["--batches", str(batches), *_flags(as_json=as_json, traceback=traceback)]
        _here_or_in_ranks(["check", "gradient"], options, preparation.recipe, ranks=preparation.world_size, work=work)


def _check_has_kl(recipe: Recipe) -> None:
    if recipe.kl.beta == 0:
        raise UserError("is 0: there is no KL term to check", field="kl.beta", fix="set kl.beta above 0")


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
