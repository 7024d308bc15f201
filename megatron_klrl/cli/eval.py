"""``klrl eval``."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.preparation import announce, prepare
from megatron_klrl.cli.rank import RankPlace, rank_place, run_as_rank
from megatron_klrl.cli.reporting import errors_reported, tell
from megatron_klrl.cli.run_dir import CONFIG_FILE, prepare_run_dir
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError
from megatron_klrl.launch.local import run_ranks


def evaluate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Evaluate this checkpoint of a run.", show_default=False)
    ] = None,
    hf: Annotated[
        Path | None, typer.Option("--hf", help="Evaluate this Hugging Face folder.", show_default="the recipe's model")
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Evaluate on the recipe's evaluation sets: mean, pass@k, 95 % interval.

    The report is also written beside the checkpoint or folder, as NAME.eval-HASH.json, HASH of the recipe.

    Example: klrl eval examples/recipes/arithmetic_cpu.yaml --checkpoint runs/first/checkpoints/100
    """
    with errors_reported(traceback=traceback):
        place = rank_place()
        work = _Work(checkpoint=checkpoint, hf=hf, as_json=as_json, traceback=traceback)
        if place is not None and place.run_dir is not None:
            work.as_rank(load_recipe(place.run_dir / CONFIG_FILE), place)
            return
        _check_weights(checkpoint, hf)
        preparation = prepare(recipe, overrides or (), place=place)
        if not preparation.recipe.data.eval:
            problem, fix = "has no evaluation set", "add one under data.eval: <name>: {task: ..., prompts: ...}"
            raise UserError(problem, field="data.eval", fix=fix)
        if place is None or place.rank == 0:
            weights = checkpoint or hf or Path(preparation.recipe.model.path)
            announce("eval", preparation, target=str(weights), to_stderr=as_json)
        if place is not None:
            work.as_rank(preparation.recipe, place)
        elif preparation.world_size == 1:
            work.here(preparation.recipe)
        else:
            raise typer.Exit(work.in_ranks(preparation.recipe, preparation.world_size))


def _check_weights(checkpoint: Path | None, hf: Path | None) -> None:
    if checkpoint is not None and hf is not None:
        raise UserError("--checkpoint and --hf exclude each other", field="--checkpoint", fix="give one of them")
    if checkpoint is not None and not checkpoint.is_dir():
        fix = "give a folder under checkpoints/ of a run directory"
        raise UserError(f"there is no folder {checkpoint}", field="--checkpoint", fix=fix)
    if hf is not None:
        describe_model(hf)


class _Work:
    """One evaluation, to be done in this process or in ranks."""

    def __init__(self, *, checkpoint: Path | None, hf: Path | None, as_json: bool, traceback: bool) -> None:
        self._checkpoint = checkpoint
        self._hf = hf
        self._as_json = as_json
        self._traceback = traceback

    def here(self, recipe: Recipe) -> None:
        """In this process, as the only rank or as one of several."""
        from megatron_klrl.jobs import eval_rank

        eval_rank(recipe, self._checkpoint, self._hf, as_json=self._as_json)

    def as_rank(self, recipe: Recipe, place: RankPlace) -> None:
        """In this process, which a launcher started."""
        run_as_rank(lambda: self.here(recipe), place=place, run_dir=place.run_dir, traceback=self._traceback)

    def in_ranks(self, recipe: Recipe, ranks: int) -> int:
        """In ranks on this machine; their folder goes when all went well and stays, named, when not."""
        folder = Path(tempfile.mkdtemp(prefix="klrl-eval-"))
        prepare_run_dir(folder, recipe, resume=False)
        code = run_ranks(self._argv(folder), ranks, folder, report=tell)
        if code == 0:
            shutil.rmtree(folder)
        else:
            tell(f"output of the ranks: {folder}")
        return code

    def _argv(self, folder: Path) -> list[str]:
        argv = ["eval", str(folder / CONFIG_FILE)]
        argv += ["--checkpoint", str(self._checkpoint)] if self._checkpoint else []
        argv += ["--hf", str(self._hf)] if self._hf else []
        argv += ["--json"] if self._as_json else []
        return [*argv, "--traceback"] if self._traceback else argv
