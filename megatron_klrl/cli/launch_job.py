"""From a command line to a batch job: everything is checked before anything is written or submitted."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_klrl.cli.preparation import Preparation, prepare_elsewhere
from megatron_klrl.cli.reporting import tell
from megatron_klrl.cli.run_dir import RUNS, choose_run_dir, prepare_run_dir
from megatron_klrl.config.cluster import Cluster
from megatron_klrl.config.describe import kl_text, layout_text
from megatron_klrl.config.load import dump_recipe
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.batch_script import CODE, LOGS, BatchJob, Kind, job_name
from megatron_klrl.launch.code_copy import Sources, copy_sources, find_sources
from megatron_klrl.launch.interpreter import python_of

_CHECK_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        recipe: YAML file of a run, or of a study.
        overrides: of the recipe.
        kind: of the work.
        cluster: the cluster file, with what the command line changed.
        run_dir: of the run; None: a new one under runs/.
        resume: continue the run there.
        array: shards of a study.
        weights: options of klrl eval that say whose weights.
    """

    recipe: Path
    overrides: Sequence[str]
    kind: Kind
    cluster: Cluster
    run_dir: Path | None
    resume: bool
    array: int | None = None
    weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A checked job that has not been submitted.

    Attributes:
        job: to render.
        preparation: the checked recipe; None for a study, which checks its cells itself.
        sources: what is copied beside the run; None: the installed package runs.
        resume: the run directory holds an earlier start.
        warnings: what the rules found worth saying.
    """

    job: BatchJob
    preparation: Preparation | None
    sources: Sources | None
    resume: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe that the job reads."""
        return _recipe_file(self.job.run_dir, self.job.name)

    def text(self) -> str:
        """What runs where, in one line."""
        cluster, job = self.job.cluster, self.job
        size = f"{cluster.nodes} nodes x {cluster.ranks_of_node} ranks"
        if self.preparation is None:
            return f"{job.name}: {job.array} shards, a node with {cluster.ranks_of_node} ranks each"
        recipe = self.preparation.recipe
        layout = layout_text(recipe, world_size=self.preparation.world_size)
        return f"{job.name}: {size}: {layout}, KL: {kl_text(recipe)}"

    def sources_text(self) -> str:
        """Which sources the job runs."""
        if self.sources is None:
            return "the installed megatron_klrl, not copied: it runs from no git checkout"
        return f"{len(self.sources.files)} tracked files of {self.sources.root} at {self.sources.commit}"


def plan_launch(request: Request) -> Launch:
    """Check a request.

    Raises:
        UserError: the recipe, the number of ranks, an option or the run directory is wrong.
    """
    _check_options(request)
    cluster = request.cluster
    preparation = None
    warnings: list[str] = []
    if request.kind is Kind.STUDY:
        _check_study(request.recipe)
    else:
        ranks = cluster.nodes * cluster.ranks_of_node
        preparation = prepare_elsewhere(request.recipe, request.overrides, world_size=ranks, gpus=cluster.gpus_per_node)
        warnings = [*preparation.warnings, *_across_nodes(preparation, cluster)]
    stem = request.recipe.stem
    name = f"{stem}-eval" if request.kind is Kind.EVAL else stem
    run_dir = _run_dir(request, name).absolute()
    sources = find_sources()
    warnings += _not_copied(sources)
    job = BatchJob(
        kind=request.kind,
        name=job_name(name),
        cluster=cluster,
        run_dir=run_dir,
        work_dir=Path.cwd(),
        code=run_dir / CODE if sources else None,
        python=python_of(cluster),
        arguments=_arguments(request, run_dir, job_name(name)),
        array=(request.array or 1) if request.kind is Kind.STUDY else None,
    )
    return Launch(job=job, preparation=preparation, sources=sources, resume=request.resume, warnings=warnings)


def write_launch(launch: Launch) -> None:
    """Everything the job needs in its run directory: the recipe, and the sources.

    Raises:
        WorkError: it cannot be written.
    """
    run_dir = launch.job.run_dir
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        if launch.preparation is not None:
            launch.recipe_file.write_text(dump_recipe(launch.preparation.recipe), encoding="utf-8")
            if launch.job.kind is Kind.TRAIN and not launch.resume:
                # The job always says --resume, for it may be requeued, and to resume is to continue what stands here.
                prepare_run_dir(run_dir, launch.preparation.recipe, resume=False)
    except OSError as error:
        raise WorkError(f"{run_dir} cannot be written: {error}") from error
    if launch.sources is not None:
        copy_sources(launch.sources, run_dir / CODE)


def warn(launch: Launch) -> None:
    """Tell the warnings."""
    for warning in launch.warnings:
        tell(f"warning: {warning}")


def _check_options(request: Request) -> None:
    study = request.kind is Kind.STUDY
    if request.array is not None and not study:
        raise UserError("splits a study", field="--array", fix="add --kind study, or leave --array away")
    if request.weights and request.kind is not Kind.EVAL:
        option = request.weights[0]
        raise UserError("says what to evaluate", field=option, fix=f"add --kind eval, or leave {option} away")
    if request.resume and request.kind is not Kind.TRAIN:
        fix = "leave --resume away; a study goes on by itself in its folder"
        raise UserError("continues a training", field="--resume", fix=fix)
    if study and request.overrides:
        problem = f"{request.overrides[0]!r} changes a recipe, and a study has many"
        raise UserError(problem, field="KEY=VALUE", fix="write it into the study's file")
    if study and request.cluster.nodes > 1:
        problem = f"is {request.cluster.nodes}, but a shard of a study runs on one node"
        raise UserError(problem, field="nodes", fix="set nodes to 1, and --array to the number of nodes")


def _check_study(file: Path) -> None:
    """Every cell of a study is checked by the command that will run it."""
    command = [sys.executable, "-m", "megatron_klrl.cli", "study", str(file), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, check=False)
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1].removeprefix("klrl: ")
        raise UserError(message) if done.returncode == UserError.exit_code else WorkError(message)


def _not_copied(sources: Sources | None) -> list[str]:
    """Python files that a forgotten git add would keep from the job."""
    names = [str(file) for file in (sources.untracked if sources else ()) if file.suffix == ".py"]
    return [f"the job runs the files that git tracks, without: {', '.join(names)}"] if names else []


def _across_nodes(preparation: Preparation, cluster: Cluster) -> list[str]:
    recipe, here = preparation.recipe, cluster.ranks_of_node
    sizes = {"parallel.tensor": recipe.parallel.tensor, "generation.tensor": recipe.generation.tensor}
    return [
        f"{field} is {size}, but a node has {here} ranks: every layer waits for the network between nodes"
        for field, size in sizes.items()
        if size > here
    ]


def _run_dir(request: Request, name: str) -> Path:
    if request.kind is Kind.STUDY:
        return (
            request.run_dir or RUNS / name
        )  # the folder that klrl study takes by itself: what is done there stays done
    return choose_run_dir(name, request.run_dir, resume=request.resume, place=None)


def _recipe_file(run_dir: Path, name: str) -> Path:
    return run_dir / LOGS / f"{name}.yaml"


def _arguments(request: Request, run_dir: Path, name: str) -> tuple[str, ...]:
    if request.kind is Kind.STUDY:
        return ("study", str(request.recipe.absolute()), "--out", str(run_dir))
    recipe = str(_recipe_file(run_dir, name))
    if request.kind is Kind.EVAL:
        return ("eval", recipe, *request.weights)
    return ("train", recipe, "--run-dir", str(run_dir), "--resume")
