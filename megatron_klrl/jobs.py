"""The jobs a rank can be given: train, evaluate, check, export. Heavy imports happen inside, under a visible phase."""

import json
import os
import shlex
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klrl.config.describe import kl_text, kl_verdict, layout_text, objective_text
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import ParallelSection, Recipe
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.failure import Failure, write_failure
from megatron_klrl.launch.forked import RankFailedError, run_forked, start_server
from megatron_klrl.launch.local import RUN_DIR_VARIABLE
from megatron_klrl.runtime.logs import log_file, stderr_into
from megatron_klrl.runtime.place import Places, place_file
from megatron_klrl.runtime.step_bound import StepBound
from megatron_klrl.runtime.stop import listen
from megatron_klrl.tracking.console import RunConsole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megatron_klrl.build import Site
    from megatron_klrl.diagnostics.layouts import NamedLayout
    from megatron_klrl.diagnostics.report import Report
    from megatron_klrl.loop.parts import Parts


_LAYOUT_TIMEOUT_S = 1800.0


def train_rank(recipe: Recipe, run_dir: Path, *, resume: bool) -> None:
    """Train on this rank, from the model folder or the newest checkpoint, to the export of the result or a signal."""
    stop = listen(has_launcher="RANK" in os.environ)
    rank = _rank()
    places = Places(place_file(run_dir, rank) if RUN_DIR_VARIABLE in os.environ else None)
    console = RunConsole(steps=recipe.loop.steps, quiet=rank != 0, places=places)
    with _stderr_into(log_file(run_dir, rank)):
        sys.stderr.write(f"KL: {kl_text(recipe)}: {kl_verdict(recipe)}\n")
        with console.phase("import torch and Megatron-Core"):
            from megatron_klrl import build  # noqa: PLC0415  9 s of imports, under a phase that says so
            from megatron_klrl.loop.checkpoints import Checkpoints  # noqa: PLC0415
            from megatron_klrl.loop.run import Ends, Run  # noqa: PLC0415
        with build.site(recipe) as place:
            checkpoints = Checkpoints(run_dir / "checkpoints", recipe.checkpoint)
            if resume and checkpoints.to_resume(console.say) is None:
                console.say(f"  nothing to resume: {run_dir} holds no checkpoint yet; starting from step 0")
            parts = _parts(recipe, place, console, places)
            run = Run(
                parts,
                run_dir,
                console=console,
                tokenizer=place.tokenizer,
                source=place.folder,
                facts=card_facts(recipe, place, command=shlex.join(["klrl", *sys.argv[1:]])),
                checkpoints=checkpoints,
                ends=Ends(stop=stop, bound=step_bound(recipe, run_dir, parts)),
            )
            asked = run.train()
            if asked:
                run.leave_unfinished(asked)
                parts.close()
                return
            with console.phase("export to Hugging Face folder"):
                exported = run.export()
            run.finish(exported)
            parts.close()
    console.say(f"run directory  {run_dir}")
    logdir = run_dir.parent if run_dir.parent.name == "runs" else run_dir  # a home shows all runs side by side
    console.say(f"watch it with  {_beside_python('tensorboard')} --logdir {logdir}")


def step_bound(recipe: Recipe, run_dir: Path, parts: "Parts") -> StepBound:
    """What ends this rank when a step takes longer than the recipe allows."""
    rank = parts.world.rank

    def fail(reason: str) -> None:
        first = write_failure(run_dir, Failure(kind="work", rank=rank, message=reason))
        if first and RUN_DIR_VARIABLE not in os.environ:  # else our launcher speaks; standard error is in the log
            os.write(1, f"klrl: {reason}\n".encode())

    return StepBound(
        run_dir,
        rank=rank,
        ranks=parts.world.size,
        timeout_s=recipe.loop.step_timeout_s,
        place=lambda: parts.timers.places.now,
        fail=fail,
    )


def eval_rank(recipe: Recipe, checkpoint: Path | None, hf: Path | None, *, as_json: bool) -> None:
    """Evaluate a checkpoint, a Hugging Face folder, or the recipe's own model; rank 0 reports.

    Beside a checkpoint or a folder that was named, the report is also written as a file (`eval_report.write_beside`).

    Raises:
        WorkError: the recipe has no evaluation set, or the file cannot be written.
    """
    if hf is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(hf)})})
    if not recipe.data.eval:
        raise WorkError("the recipe has no evaluation set: add one under data.eval")
    console = RunConsole(steps=0, quiet=_rank() != 0 or as_json)
    with _stderr_into(Path(os.devnull)):
        with console.phase("import torch and Megatron-Core"):
            from megatron_klrl import build  # noqa: PLC0415
            from megatron_klrl.loop import checkpoints, eval_report  # noqa: PLC0415
        with build.site(recipe) as place:
            parts = _parts(recipe, place, console)
            if checkpoint is not None:
                checkpoints.check(checkpoint)
                parts.trainer.load(checkpoint)
                parts.engine.update_weights(parts.trainer.export_weights(), version=1)
            with console.phase(f"evaluation: {', '.join(parts.evaluation)}"):
                report = eval_report.evaluate_all(parts, source=str(checkpoint or recipe.model.path))
            parts.close()
    if _rank() != 0:
        return
    lines = [json.dumps(eval_report.as_json(report), indent=2)] if as_json else eval_report.table(report)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    named = checkpoint or hf
    if named is not None:
        console.say(f"written to {eval_report.write_beside(named, report)}")


def check_gradient_rank(recipe: Recipe, *, batches: int, as_json: bool) -> "Report":
    """Probe the KL term's gradient on the recipe's model; the same report on every rank.

    Args:
        recipe: with ``kl.beta`` above 0.
        batches: of the recipe's size, for each of gradient and descent.
        as_json: keep standard output free of everything else.
    """
    console = RunConsole(steps=0, quiet=_rank() != 0 or as_json)
    with _stderr_into(Path(os.devnull)):
        with console.phase("import torch and Megatron-Core"):
            from megatron_klrl import build  # noqa: PLC0415
            from megatron_klrl.diagnostics.gradient_probe import GradientProbe  # noqa: PLC0415
        with build.site(recipe) as place:
            parts = _parts(recipe, place, console)
            with console.phase("probe of the KL term's gradient"):
                report = GradientProbe(parts, batches=batches).run()
            parts.close()
    return report


def check_sync_rank(recipe: Recipe, *, as_json: bool) -> "Report":
    """Refit the engines from the trainer and compare both; the same report on every rank.

    Args:
        recipe: whose engines are built; it is sampled at temperature 1, for only weights are compared.
        as_json: keep standard output free of everything else.
    """
    generation = recipe.generation.model_copy(update={"temperature": 1.0, "sleep": False})
    recipe = recipe.model_copy(update={"generation": generation})
    console = RunConsole(steps=0, quiet=_rank() != 0 or as_json)
    with _stderr_into(Path(os.devnull)):
        with console.phase("import torch and Megatron-Core"):
            from megatron_klrl import build  # noqa: PLC0415
            from megatron_klrl.diagnostics.sync_check import SyncCheck  # noqa: PLC0415
        with build.site(recipe) as place:
            parts = _parts(recipe, place, console)
            with console.phase("refit, and both sides of it"):
                report = SyncCheck(parts).run()
            parts.close()
    return report


def check_layouts(
    recipe: Recipe, layouts: "Sequence[NamedLayout]", baseline: "NamedLayout", *, sequences: int, as_json: bool
) -> "Report":
    """The recipe's update in several layouts against one rank, each in ranks that this process starts.

    Args:
        recipe: of the user.
        layouts: to look at.
        baseline: the single rank.
        sequences: rollouts of the update, at least.
        as_json: keep standard output free of everything else.
    """
    console = RunConsole(steps=0, quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="klrl-check-layout-") as folder, _stderr_into(Path(os.devnull)):
        with console.phase("import torch and Megatron-Core"):
            from megatron_klrl.diagnostics import layout_check  # noqa: PLC0415

            start_server(["megatron_klrl.mcore.engine"])
        rollout_file = Path(folder, "rollouts.safetensors")
        with console.phase(f"vLLM: {sequences} rollouts"):
            _forked(baseline, _sample_for_layouts, baseline.recipe, sequences, rollout_file)
        for layout in (baseline, *layouts):
            Path(folder, layout.name).mkdir()
            with console.phase(f"{layout.name}: {layout_text(layout.recipe, world_size=layout.ranks)}"):
                _forked(layout, _measure_layout, layout.recipe, rollout_file, Path(folder, layout.name))
        found = [(layout.name, layout.ranks, Path(folder, layout.name)) for layout in layouts]
        return layout_check.compare(found, Path(folder, baseline.name), subject=f"update: {objective_text(recipe)}")


def _forked(layout: "NamedLayout", function: "Callable[..., None]", *args: Any) -> None:
    try:
        run_forked(layout.ranks, function, *args, timeout_s=_LAYOUT_TIMEOUT_S)
    except RankFailedError as failure:
        if isinstance(failure.error, UserError | WorkError):
            raise failure.error from failure
        raise WorkError(f"layout {layout.name}: {failure}") from failure


def _sample_for_layouts(recipe: Recipe, sequences: int, to: Path) -> None:
    from megatron_klrl import build  # noqa: PLC0415
    from megatron_klrl.diagnostics import layout_check  # noqa: PLC0415

    with build.site(recipe) as place:
        engine = build.build_engine(recipe, place)
        parts = build.build_parts(recipe, place, trainer=None, engine=engine)
        layout_check.write_batch(layout_check.sample(parts, sequences=sequences), to)
        engine.close()


def _measure_layout(recipe: Recipe, rollout_file: Path, to: Path) -> None:
    from megatron_klrl import build  # noqa: PLC0415
    from megatron_klrl.diagnostics import layout_check  # noqa: PLC0415

    with build.site(recipe) as place:
        trainer = build.build_trainer(recipe, place)
        layout_check.measure(trainer, recipe, place.world, rollout_file=rollout_file, to=to)


def export_checkpoint(checkpoint: Path, to: Path) -> None:
    """Write a checkpoint's policy as a Hugging Face folder, in this process alone."""
    with _stderr_into(Path(os.devnull)):
        from megatron_klrl import build  # noqa: PLC0415
        from megatron_klrl.loop import checkpoints  # noqa: PLC0415
        from megatron_klrl.loop.export import write_hf_folder  # noqa: PLC0415

        recipe = load_recipe(checkpoints.recipe_file(checkpoint), [])
        with build.site(recipe.model_copy(update={"parallel": ParallelSection()})) as place:
            checkpoints.check(checkpoint)
            weights = build.checkpoint_weights(recipe, place, checkpoint)
            write_hf_folder(weights, source=place.folder, to=to, writes=True)


def _parts(recipe: Recipe, place: "Site", console: RunConsole, places: Places | None = None) -> "Parts":
    from megatron_klrl import build  # noqa: PLC0415

    with console.phase("Megatron-Core: model, reference, optimizer"):
        trainer = build.build_trainer(recipe, place)
    with console.phase("vLLM: import and start (first start on a machine takes longer)"):
        engine = build.build_engine(recipe, place)
    parts = build.build_parts(recipe, place, trainer=trainer, engine=engine, places=places)
    for task in (parts.task, *(evaluation.task for evaluation in parts.evaluation.values())):
        for note in task.notes:
            console.say(f"  {note}")
    return parts


def card_facts(recipe: Recipe, place: "Site", *, command: str) -> dict[str, str]:
    """What the run card says of a run from its start."""
    return {
        "objective": objective_text(recipe),
        "KL": kl_text(recipe),
        "KL verdict": kl_verdict(recipe),
        "model": recipe.model.path,
        "layout": layout_text(recipe, world_size=place.world.size),
        "command": command,
    }


def _beside_python(program: str) -> str:
    """A program of this environment as the user would type it here: the environment need not be on PATH."""
    path = Path(sys.prefix, "bin", program)
    if not path.is_file():
        return program
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _stderr_into(file: Path) -> AbstractContextManager[None]:
    """Libraries' chatter goes to the log, unless the user wants to see it: KLRL_STDERR=1."""
    return nullcontext() if os.environ.get("KLRL_STDERR") == "1" else stderr_into(file)
