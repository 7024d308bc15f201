"""Batch scripts of SLURM: rendered from templates, a cluster file and a job. Pure text; submitting is `slurm`'s."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path

from megatron_klrl.config.cluster import Cluster
from megatron_klrl.errors import UserError

LOGS = "slurm"
"""Folder of a run directory with the batch script, the recipe it runs and what the job wrote."""
CODE = "code"
"""Folder of a run directory with the sources that its job runs."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_CONTINUED = " \\\n        "
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


class Kind(StrEnum):
    """What a job does."""

    TRAIN = "train"
    STUDY = "study"
    EVAL = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """Everything a batch script is made of.

    Attributes:
        kind: of the work.
        name: of the job.
        cluster: the cluster file, with what the command line changed.
        run_dir: of the run; absolute.
        work_dir: that relative paths of the recipe start from; absolute.
        code: the copied sources, absolute; None: the installed package runs.
        python: interpreter on the nodes.
        arguments: of klrl.
        array: tasks of a job array; None: one job.
    """

    kind: Kind
    name: str
    cluster: Cluster
    run_dir: Path
    work_dir: Path
    code: Path | None
    python: str
    arguments: tuple[str, ...]
    array: int | None = None


def render_script(job: BatchJob) -> str:
    """The batch script of a job.

    Raises:
        UserError: a path holds what neither SLURM nor a shell takes on one line.
    """
    values = _values(job)
    values["torchrun"] = _fill(_template("torchrun.sh"), values)
    return _render(f"{job.kind}.sbatch", values)


def render_node_script(job: BatchJob) -> str:
    """What NeMo-Run's batch script runs on each node: the environment, and a torchrun that lets the ranks save.

    Raises:
        UserError: as `render_script`.
    """
    return _render("nemo_node.sh", _values(job))


def render_here_script(python: str, arguments: Sequence[str], work_dir: Path) -> str:
    """What NeMo-Run runs on this machine: klrl, which starts the ranks itself."""
    values = {"python": shlex.quote(python), "arguments": shlex.join(arguments), "work_dir": shlex.quote(str(work_dir))}
    return _render("nemo_here.sh", values)


def _render(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", _fill(_template(template), values)) + "\n"


def _values(job: BatchJob) -> dict[str, str]:
    for path in (job.run_dir, job.work_dir):
        _check_path(path)
    return {
        "directives": _directives(job),
        "environment": _fill(_template("environment.sh"), {"setup": _setup(job), "exports": _exports(job)}),
        "waiting": _template("waiting.sh"),
        "srun": _srun(job),
        "run_dir": shlex.quote(str(job.run_dir)),
        "requeues": str(job.cluster.requeues),
        "nodes": str(job.cluster.nodes),
        "ranks": str(job.cluster.ranks_of_node),
        "restarts": str(job.cluster.restarts),
        "python": shlex.quote(job.python),
        "arguments": shlex.join(job.arguments),
    }


def job_name(stem: str) -> str:
    """A name that SLURM takes, from that of a recipe: other characters become underscores."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem)[:64] or "klrl"


def _template(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    """Values are put in once and not looked into again: what they hold stays what it is."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]].rstrip("\n"), template).rstrip("\n")


def _check_path(path: Path) -> None:
    if re.search(r"[\x00-\x1f\x7f\\\":,]", str(path)):
        problem = f"{str(path)!r} holds what a batch script, PYTHONPATH or a list of mounts cannot"
        raise UserError(problem, field="--run-dir", fix='choose a path without " \\ : , and line breaks')


def _directives(job: BatchJob) -> str:
    cluster = job.cluster
    log = "job-%A_%a.out" if job.array else "job-%j.out"
    options = [
        f"--job-name={job.name}",
        *_given("--partition", cluster.partition),
        *_given("--account", cluster.account),
        *_given("--qos", cluster.qos),
        *_given("--time", cluster.time),
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(job)}",
        *([f"--gpus-per-node={_gpus(cluster)}"] if cluster.gpus_per_node else []),
        *_given("--mem", cluster.memory),
        *(["--exclusive"] if cluster.exclusive else []),
        *([f"--array=0-{job.array - 1}"] if job.array else []),
        f'--output="{_pattern(job.run_dir)}/{LOGS}/{log}"',
        "--open-mode=append",
        "--requeue",
        *([] if job.kind is Kind.EVAL else [f"--signal=B:USR1@{cluster.save_s}"]),
        *cluster.options,
    ]
    return "\n".join(f"#SBATCH {option}" for option in options)


def _given(option: str, value: str | None) -> list[str]:
    return [] if value is None else [f"{option}={value}"]


def _pattern(path: Path) -> str:
    """A path in a pattern of file names, where % begins a replacement."""
    return str(path).replace("%", "%%")


def _gpus(cluster: Cluster) -> str:
    return f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)


def _cpus(job: BatchJob) -> int:
    return job.cluster.cpus_per_rank * job.cluster.ranks_of_node


def _setup(job: BatchJob) -> str:
    modules = [f"module load {shlex.quote(module)}" for module in job.cluster.modules]
    return "\n".join([*modules, *job.cluster.setup, f"cd {shlex.quote(str(job.work_dir))} || exit 1"])


def _exports(job: BatchJob) -> str:
    cluster = job.cluster
    sources = [*([str(job.code)] if job.code else []), str(job.work_dir)]
    variables = {
        # The copy comes first; the working directory holds the modules of a user's own rewards.
        "PYTHONPATH": shlex.quote(":".join(sources)) + '"${PYTHONPATH:+:$PYTHONPATH}"',
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    if cluster.network_interface is not None:
        interface = shlex.quote(cluster.network_interface)
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    variables |= _OFFLINE if cluster.offline else {}
    variables |= {name: shlex.quote(value) for name, value in cluster.environment.items()}
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


def _srun(job: BatchJob) -> str:
    nodes = job.cluster.nodes
    flags = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={_cpus(job)}"]
    # One node that fails ends the others' wait for it.
    flags.append("--kill-on-bad-exit=1")
    return _CONTINUED.join([shlex.join(flags), *map(shlex.quote, _container(job))])


def _container(job: BatchJob) -> Sequence[str]:
    container = job.cluster.container
    if container is None:
        return ()
    own = [f"{path}:{path}" for path in dict.fromkeys((job.work_dir, job.run_dir))]
    mounts = ",".join([*container.mounts, *own])
    return (
        f"--container-image={container.image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={job.work_dir}",
    )
