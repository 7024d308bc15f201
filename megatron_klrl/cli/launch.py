"""``klrl launch slurm`` and ``klrl launch nemo-run``."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_klrl.cli.launch_job import Launch, Request, plan_launch, warn, write_launch
from megatron_klrl.cli.options import JsonOption, OverridesArgument, RecipeArgument, TracebackOption
from megatron_klrl.cli.preparation import prepare
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.cli.run_dir import choose_run_dir
from megatron_klrl.config.cluster import Cluster, load_cluster
from megatron_klrl.errors import UserError
from megatron_klrl.launch import nemo_run as nemo
from megatron_klrl.launch import slurm as queue
from megatron_klrl.launch.batch_script import Kind, render_script

app = typer.Typer(help="Write a cluster's job, and submit it.", no_args_is_help=True)

ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="YAML cluster file, needed for SLURM.", show_default=False)
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Nodes, in place of the cluster file's.", show_default=False)
]
TimeOption = Annotated[
    str | None, typer.Option("--time", help="Time limit, in place of the cluster file's.", show_default=False)
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run.", show_default="runs/RECIPE-DATE-TIME")
]

ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")]


@app.command()
def slurm(  # noqa: PLR0913 - the options of a command are its parameters
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    cluster: ClusterOption = None,
    kind: Annotated[Kind, typer.Option("--kind", help="What the job does.")] = Kind.TRAIN,
    nodes: NodesOption = None,
    time: TimeOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    array: Annotated[
        int | None, typer.Option("--array", min=1, help="Shards of a study, a node each.", show_default="1")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="What --kind eval evaluates.", show_default=False)
    ] = None,
    hf: Annotated[
        Path | None, typer.Option("--hf", help="Or a Hugging Face folder.", show_default="the recipe's model")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the script, submit nothing.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Submit a training, a study or an evaluation to SLURM: sbatch, srun, torchrun; requeued when it is stopped.

    Example: klrl launch slurm recipe.yaml --cluster cluster.yaml --nodes 2 --time 4:00:00 --run-dir runs/first
    """
    with errors_reported(traceback=traceback):
        request = Request(
            recipe=recipe,
            overrides=overrides or (),
            kind=kind,
            cluster=_cluster(cluster, nodes, time),
            run_dir=run_dir,
            resume=resume,
            array=array,
            weights=_weights(checkpoint, hf),
        )
        launch = plan_launch(request)
        if dry_run:
            _show(launch, as_json=as_json)
            return
        queue.check_can_submit()
        queue.check_not_running(launch.job.run_dir)
        write_launch(launch)
        _report(launch, queue.submit(launch.job), as_json=as_json)


class Executor(StrEnum):
    """Where NeMo-Run runs a training."""

    LOCAL = "local"
    SLURM = "slurm"


@app.command("nemo-run")
def nemo_run(  # noqa: PLR0913 - the options of a command are its parameters
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    executor: Annotated[Executor, typer.Option("--executor", help="Where it runs.")] = Executor.LOCAL,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    time: TimeOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the job is in the queue.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print what NeMo-Run would run.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Train through NeMo-Run, on this machine or on SLURM; needs megatron-klrl[nemo-run].

    Example: klrl launch nemo-run recipe.yaml --executor slurm --cluster cluster.yaml --run-dir runs/first
    """
    with errors_reported(traceback=traceback):
        nemo.check_installed()
        if executor is Executor.LOCAL:
            _refuse_cluster_options(cluster, nodes, time, detach=detach)
            preparation = prepare(recipe, overrides or (), place=None)
            chosen = choose_run_dir(preparation.name, run_dir, resume=resume, place=None).absolute()
            script = nemo.train_script(recipe, *(overrides or ()), run_dir=chosen, resume=resume)
            ended = nemo.launch(script, nemo.local_executor(), title=preparation.name, dry_run=dry_run)
        else:
            plan = plan_launch(_training(recipe, overrides, _cluster(cluster, nodes, time), run_dir, resume=resume))
            warn(plan)
            if not dry_run:
                queue.check_not_running(plan.job.run_dir)
                write_launch(plan)
            there = nemo.slurm_executor(plan.job.cluster, run_dir=plan.job.run_dir)
            script, title = nemo.script_on_nodes(plan.job), plan.job.name
            ended = nemo.launch(script, there, title=title, dry_run=dry_run, detach=detach)
        if dry_run:
            typer.echo(f"scripts/klrl.sh, run by the above:\n\n{script.inline}", nl=False)
        for name, value in ended.items():
            typer.echo(f"{name:<10} {value}")


def _refuse_cluster_options(cluster: Path | None, nodes: int | None, time: str | None, *, detach: bool) -> None:
    given = {"--cluster": cluster, "--nodes": nodes, "--time": time, "--detach": detach or None}
    for option, value in given.items():
        if value is not None:
            raise UserError("is for SLURM", field=option, fix=f"add --executor slurm, or leave {option} away")


def _cluster(file: Path | None, nodes: int | None, time: str | None) -> Cluster:
    if file is None:
        fix = "give a cluster file; examples are in slurm/clusters of the source tree"
        raise UserError("is needed for SLURM", field="--cluster", fix=fix)
    changed = {"nodes": nodes, "time": time}
    return load_cluster(file, {key: value for key, value in changed.items() if value is not None})


def _training(
    recipe: Path, overrides: list[str] | None, cluster: Cluster, run_dir: Path | None, *, resume: bool
) -> Request:
    chosen = overrides or ()
    return Request(recipe=recipe, overrides=chosen, kind=Kind.TRAIN, cluster=cluster, run_dir=run_dir, resume=resume)


def _weights(checkpoint: Path | None, hf: Path | None) -> tuple[str, ...]:
    chosen = [("--checkpoint", checkpoint), ("--hf", hf)]
    return tuple(text for option, path in chosen if path is not None for text in (option, str(path.absolute())))


def _show(launch: Launch, *, as_json: bool) -> None:
    script = render_script(launch.job)
    if as_json:
        typer.echo(json.dumps({**_as_dict(launch), "script": script}, indent=2))
        return
    warn(launch)
    typer.echo(script, nl=False)


def _report(launch: Launch, submitted: queue.Submitted, *, as_json: bool) -> None:
    run_dir, job_id = launch.job.run_dir, submitted.job_id
    commands = {
        "watch": f"tail -F {submitted.log}",
        "state": f"squeue --jobs={job_id}",
        "cancel": f"scancel {job_id}",
    }
    if launch.job.kind is Kind.TRAIN:
        commands["save, then end"] = f"scancel --signal=INT --batch {job_id}"
        commands["continue"] = f"the same command with --run-dir {run_dir} --resume"
    if as_json:
        record = {name: str(value) for name, value in asdict(submitted).items()}
        typer.echo(json.dumps({**_as_dict(launch), **record, "commands": commands}, indent=2))
        return
    warn(launch)
    typer.echo(f"klrl launch: job {job_id}: {launch.text()} -> {run_dir}")
    typer.echo(f"{'sources':<15} {launch.sources_text()}")
    for what, command in commands.items():
        typer.echo(f"{what:<15} {command}")


def _as_dict(launch: Launch) -> dict[str, object]:
    cluster = launch.job.cluster
    return {
        "name": launch.job.name,
        "kind": str(launch.job.kind),
        "run_dir": str(launch.job.run_dir),
        "nodes": cluster.nodes,
        "ranks_per_node": cluster.ranks_of_node,
        "sources": launch.sources_text(),
        "warnings": launch.warnings,
    }
