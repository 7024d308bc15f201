"""``klrl config show``, ``klrl config diff`` and ``klrl config presets``."""

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.config.load import diff_recipes, dump_recipe, load_recipe
from megatron_klrl.config.presets import PRESETS, Preset

_PIPED_WIDTH = 120

app = typer.Typer(help="Resolved configurations.", no_args_is_help=True)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Print the resolved recipe, defaults included.

    Example: klrl config show examples/recipes/arithmetic_cpu.yaml kl.beta=0.3
    """
    with errors_reported(traceback=traceback):
        resolved = load_recipe(recipe, overrides or ())
        text = json.dumps(resolved.model_dump(mode="json"), indent=2) if as_json else dump_recipe(resolved).rstrip()
        typer.echo(text)


@app.command()
def diff(
    left: RecipeArgument,
    right: RecipeArgument,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Print the settings two recipes differ in, defaults included.

    Example: klrl config diff runs/first/config.yaml examples/recipes/arithmetic_cpu.yaml
    """
    with errors_reported(traceback=traceback):
        differences = diff_recipes(load_recipe(left), load_recipe(right))
        if as_json:
            typer.echo(json.dumps([asdict(difference) for difference in differences], indent=2))
        elif not differences:
            typer.echo("no difference")
        else:
            width = max(len(difference.path) for difference in differences)
            for difference in differences:
                typer.echo(f"{difference.path:<{width}}  {difference.left!r} -> {difference.right!r}")


@app.command()
def presets(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """What ``preset: <name>`` stands for, and whether its KL follows the sequence- and the token-level objective.

    Example: klrl config presets --json
    """
    with errors_reported(traceback=traceback):
        if as_json:
            typer.echo(json.dumps([_as_dict(preset) for preset in PRESETS], indent=2))
            return
        console = Console()
        (console if console.is_terminal else Console(width=_PIPED_WIDTH)).print(_table())


def _as_dict(preset: Preset) -> dict[str, object]:
    return {
        "name": preset.name,
        "origin": preset.origin,
        "summary": preset.summary,
        **preset.sections(),
        "verdicts": preset.verdicts(),
        "flags": preset.translation(),
        "differences": preset.differences,
        "conversion": preset.conversion,
    }


def _table() -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("preset", "KL", "sequence", "token"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it does")
    for preset in PRESETS:
        table.add_row(preset.name, preset.kl_name(), *preset.verdicts().values(), preset.summary)
    return table
