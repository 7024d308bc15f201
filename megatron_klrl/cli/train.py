"""``klrl train``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.preparation import Preparation, announce, memory_text, plan_as_dict, prepare
from megatron_klrl.cli.rank import RankPlace, rank_place, run_as_rank
from megatron_klrl.cli.reporting import errors_reported, tell
from megatron_klrl.cli.run_dir import CONFIG_FILE, choose_run_dir, prepare_run_dir
from megatron_klrl.config.describe import kl_text, kl_verdict, layout_text
from megatron_klrl.config.load import dump_recipe, load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError
from megatron_klrl.launch.local import run_ranks
from megatron_klrl.runtime.stop import STOPS


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of the run.", show_default="runs/RECIPE-DATE-TIME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --run-dir, or this recipe's newest.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print configuration, layout, KL verdict, memory; start nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Train. Starts the ranks on this machine itself; under torchrun or 'srun torchrun' it joins.

    Example: klrl train examples/recipes/arithmetic_cpu.yaml kl.beta=0.3 loop.steps=50 --run-dir runs/first
    """
    with errors_reported(traceback=traceback):
        place = rank_place()
        if place is not None and place.run_dir is not None:
            _launched_rank(place, place.run_dir, resume=resume, traceback=traceback)
            return
        if as_json and not dry_run:
            raise UserError("goes with --dry-run only", field="--json", fix="read metrics.jsonl in the run directory")
        preparation = prepare(recipe, overrides or (), place=place)
        chosen = choose_run_dir(preparation.name, run_dir, resume=resume, place=place)
        if dry_run:
            _print_plan(preparation, chosen, as_json=as_json)
        else:
            _start(preparation, chosen, place=place, resume=resume, traceback=traceback)


def _launched_rank(place: RankPlace, run_dir: Path, *, resume: bool, traceback: bool) -> None:
    """A rank of the local launcher: the parent has checked everything and written the resolved recipe."""

    def work() -> None:
        _train_rank(load_recipe(run_dir / CONFIG_FILE), run_dir, resume=resume)

    run_as_rank(work, place=place, run_dir=run_dir, traceback=traceback)


def _start(preparation: Preparation, run_dir: Path, *, place: RankPlace | None, resume: bool, traceback: bool) -> None:
    if place is None or place.rank == 0:
        changed = prepare_run_dir(run_dir, preparation.recipe, resume=resume)
        announce("train", preparation, target=str(run_dir), to_stderr=False)
        for difference in changed:
            tell(f"warning: resumed with {difference.path}: {difference.left!r} -> {difference.right!r}")
    if place is not None:
        run_dir.mkdir(parents=True, exist_ok=True)

        def work() -> None:
            _train_rank(preparation.recipe, run_dir, resume=resume)

        run_as_rank(work, place=place, run_dir=run_dir, traceback=traceback)
    elif preparation.world_size == 1:
        _train_rank(preparation.recipe, run_dir, resume=resume)
    else:
        options = [*(["--resume"] if resume else []), *(["--traceback"] if traceback else [])]
        argv = ["train", str(run_dir / CONFIG_FILE), *options]
        raise typer.Exit(run_ranks(argv, preparation.world_size, run_dir, stops=STOPS, report=tell))


def _train_rank(recipe: Recipe, run_dir: Path, *, resume: bool) -> None:
    from megatron_klrl.jobs import train_rank

    train_rank(recipe, run_dir, resume=resume)


def _print_plan(preparation: Preparation, run_dir: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan_as_dict(preparation, run_dir=run_dir), indent=2))
        return
    lines = [
        dump_recipe(preparation.recipe),
        f"run directory: {run_dir}",
        f"layout: {layout_text(preparation.recipe, world_size=preparation.world_size)}",
        f"KL: {kl_text(preparation.recipe)}",
        f"KL verdict: {kl_verdict(preparation.recipe)}",
        memory_text(preparation),
        *(f"warning: {warning}" for warning in preparation.warnings),
        "dry run: nothing was started",
    ]
    typer.echo("\n".join(lines))
