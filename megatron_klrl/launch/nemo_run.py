"""NeMo-Run as a launcher: trainings as `run.Script`, clusters as executors. The one importer of nemo_run, when called.

Not by NeMo-Run's torchrun launcher: that one ends on USR1, leaves no time to save, and its rendezvous port is fixed.
The script here starts torchrun on each node itself, and fails after a save, for only what fails is requeued.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klrl.config.cluster import Cluster
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.launch.batch_script import BatchJob, Kind, job_name, render_here_script, render_node_script
from megatron_klrl.launch.interpreter import python_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import nemo_run as run

_ENDED_WELL = "SUCCEEDED"


def check_installed() -> None:
    """Whether NeMo-Run can be imported.

    Raises:
        UserError: it is not installed, or lacks what it imports.
    """
    _import()


def train_script(
    recipe: str | Path, *overrides: str, run_dir: str | Path, cluster: Cluster | None = None, resume: bool = False
) -> "run.Script":
    """A training as NeMo-Run's Script.

    Args:
        recipe: YAML file.
        overrides: dotted, as on the command line.
        run_dir: of the run.
        cluster: that it will run on, in an executor of `slurm_executor`; None: this machine.
        resume: continue the run there; a requeued job does that by itself.
    """
    folder, work_dir = Path(run_dir).absolute(), Path.cwd()
    arguments = ["train", str(Path(recipe).absolute()), *overrides, "--run-dir", str(folder)]
    arguments += ["--resume"] if resume else []
    if cluster is None:
        return script_here(arguments, work_dir)
    job = BatchJob(
        kind=Kind.TRAIN,
        name=job_name(Path(recipe).stem),
        cluster=cluster,
        run_dir=folder,
        work_dir=work_dir,
        code=None,
        python=python_of(cluster),
        arguments=tuple(arguments),
    )
    return script_on_nodes(job)


def script_here(arguments: Sequence[str], work_dir: Path) -> "run.Script":
    """A command of klrl as a Script for `local_executor`."""
    return _import().Script(inline=render_here_script(python_of(None), arguments, work_dir))


def script_on_nodes(job: BatchJob) -> "run.Script":
    """A job as a Script for an executor of `slurm_executor`."""
    return _import().Script(inline=render_node_script(job))


def local_executor() -> "run.LocalExecutor":
    """This machine; klrl starts the ranks."""
    return _import().LocalExecutor()


def slurm_executor(cluster: Cluster, *, run_dir: str | Path) -> "run.SlurmExecutor":
    """A cluster, as its cluster file describes it.

    Args:
        cluster: the cluster file.
        run_dir: of the run, which a container must see.

    Raises:
        UserError: the cluster file has options of sbatch that NeMo-Run has no place for.
    """
    run = _import()
    container = cluster.container
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        time=cluster.time,
        nodes=cluster.nodes,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus_per_rank * cluster.ranks_of_node,
        srun_args=[f"--cpus-per-task={cluster.cpus_per_rank * cluster.ranks_of_node}"],  # srun inherits it no more
        gpus_per_node=cluster.gpus_per_node or None,
        mem=cluster.memory,
        exclusive=cluster.exclusive or None,
        # To the step, not the batch script: that one waits for srun in the foreground, and hears nothing.
        signal=f"USR1@{cluster.save_s}",
        container_image=None if container is None else container.image,
        container_mounts=[] if container is None else _mounts(container.mounts, Path(run_dir)),
        additional_parameters=_sbatch_options(cluster) or None,
        job_name_prefix="klrl.",
        retries=cluster.requeues,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
    )


def launch(
    script: "run.Script", executor: Any, *, title: str, dry_run: bool = False, detach: bool = False
) -> dict[str, str]:
    """Run a script, and wait for it unless told to detach.

    Args:
        script: of `train_script`.
        executor: of `local_executor` or `slurm_executor`.
        title: of the experiment.
        dry_run: print what would be run.
        detach: return once the job is in the queue.

    Returns:
        What NeMo-Run knows of the task at the end: status, job id, folder; empty after a dry run.

    Raises:
        WorkError: the task did not succeed.
    """
    run = _import()
    with run.Experiment(title) as experiment:
        experiment.add(script, executor=executor, name="klrl")
        if dry_run:
            experiment.dryrun()
            return {}
        experiment.run(detach=detach, tail_logs=not detach)
    (task,) = experiment.status(return_dict=True).values()
    known = {name: str(value) for name, value in task.items()}
    if not detach and known["status"] != _ENDED_WELL:
        raise WorkError(f"the task ended as {known['status']}; its files are in {known['local_dir']}")
    return known


def _import() -> Any:
    with _explained():
        import nemo_run

        return nemo_run


@contextmanager
def _explained() -> "Iterator[None]":
    try:
        yield
    except ImportError as error:
        fix = "pip install 'megatron-klrl[nemo-run]', which also keeps leptonai below 0.40, as NeMo-Run 0.11 needs"
        raise UserError(f"NeMo-Run cannot be imported ({error})", field="klrl launch nemo-run", fix=fix) from error


def _mounts(mounts: Sequence[str], run_dir: Path) -> list[str]:
    own = [f"{path}:{path}" for path in dict.fromkeys((Path.cwd(), run_dir.absolute()))]
    # One path alone is both sides, for srun; NeMo-Run wants two.
    return [*(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts), *own]


def _sbatch_options(cluster: Cluster) -> Mapping[str, str | bool]:
    options: dict[str, str | bool] = {}
    if cluster.gpu_type is not None:
        options["gpus_per_node"] = f"{cluster.gpu_type}:{cluster.gpus_per_node}"
    for option in cluster.options:
        name, given, value = option.removeprefix("--").partition("=")
        options[name.replace("-", "_")] = value if given else True
    return options
