"""``klrl config show`` and ``klrl config diff``."""

import json
from dataclasses import asdict

import typer

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.config.load import diff_recipes, dump_recipe, load_recipe

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
