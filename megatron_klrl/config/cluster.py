"""The cluster file: what a SLURM cluster wants to know of every job, and how the ranks start there. Imports no torch.

One file serves all jobs of a cluster. Everything in it is one line of text: it ends up in a batch script.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from megatron_klrl.config import yaml_text
from megatron_klrl.config.explain import expected_words, given_words
from megatron_klrl.config.fields import Count, Flag, Positive, Section
from megatron_klrl.errors import UserError

_LONGEST_SIGNAL_S = 65535  # what sbatch --signal takes

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Text without line breaks and control characters."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+-]*$")]
"""What SLURM calls things."""
Duration = Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d+(:\d{2}){0,2}$")]
"""As sbatch writes times: MINUTES, HOURS:MM:SS, DAYS-HOURS:MM:SS."""
Interface = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9^=][A-Za-z0-9_.,:@-]*$")]
Memory = Annotated[str, StringConstraints(pattern=r"^\d+[KMGT]?$")]
SbatchOption = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[^\s'\"\\#]+)?$")]
Mount = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f,:]+(:[^\x00-\x1f\x7f,:]+){0,2}$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Value = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$")]

_BELONGS = {
    Name.__metadata__[0].pattern: "a name of letters, digits and _ . , : @ + -",
    Duration.__metadata__[0].pattern: "a time such as 30, 4:00:00 or 2-00:00:00, in quotes",
    Interface.__metadata__[0].pattern: "a network interface such as ib0",
    Memory.__metadata__[0].pattern: "memory such as 200G, or 0 for all of the node, in quotes",
    SbatchOption.__metadata__[0].pattern: "one sbatch option such as --constraint=h100, without quotes and blanks",
    Mount.__metadata__[0].pattern: "a mount such as /data or /data:/data:ro, without commas",
    Variable.__metadata__[0].pattern: "a name of a variable",
}
_ONE_LINE = "one line of text"


class ContainerSection(Section):
    """A container that each task of the job runs in, through the pyxis plugin of srun."""

    image: Line
    """What srun's --container-image gets: a registry's name, or a .sqsh file."""
    mounts: tuple[Mount, ...] = ()
    """HOST, HOST:CONTAINER or HOST:CONTAINER:ro. Run directory and directory of the launch are mounted anyway."""
    python: Line = "python"
    """The Python inside, with megatron_klrl's packages."""


class Cluster(Section):
    """All settings of a cluster file."""

    partition: Name | None = None
    """Partition; none: the cluster's default."""
    account: Name | None = None
    """Account that is charged."""
    qos: Name | None = None
    """Quality of service."""
    time: Duration | None = None
    """Time limit of one start of the job; none: the partition's."""
    nodes: Positive = 1
    """Nodes of a job."""
    gpus_per_node: Count
    """GPUs of a node; 0 on a cluster of CPUs."""
    gpu_type: Name | None = None
    """Type of GPU, where a cluster wants it named."""
    ranks_per_node: Positive | None = None
    """Ranks on a node; none: one for each GPU."""
    cpus_per_rank: Positive
    """Cores of each rank."""
    memory: Memory | None = None
    """Memory of a node, such as 200G; 0: all of it; none: the partition's default."""
    exclusive: Flag = False
    """Whole nodes, shared with nobody."""
    options: tuple[SbatchOption, ...] = ()
    """More sbatch options, one each: --constraint=h100."""
    modules: tuple[Line, ...] = ()
    """Environment modules to load."""
    setup: tuple[Line, ...] = ()
    """Shell lines that the batch script runs after loading modules, as they stand."""
    venv: Line | None = None
    """Virtual environment on a file system that all nodes see; none: the one klrl was started from."""
    container: ContainerSection | None = None
    """A container, in place of venv."""
    network_interface: Interface | None = None
    """Interface between the nodes, for NCCL and gloo; none: they choose."""
    environment: dict[Variable, Value] = Field(default_factory=dict)
    """Variables of the job."""
    offline: Flag = True
    """Compute nodes reach no model hub: HF_HUB_OFFLINE and its kin are set."""
    save_s: Annotated[Positive, Field(le=_LONGEST_SIGNAL_S)] = 300
    """Seconds before the time limit at which the ranks are told to save; longer than a step and a checkpoint take."""
    requeues: Count = 50
    """Times a job that was stopped goes back into the queue by itself; 0: never."""
    restarts: Count = 0
    """Times that torchrun starts all ranks again, on the same nodes, after one of them failed."""

    @model_validator(mode="after")
    def _agrees(self) -> "Cluster":
        if self.venv is not None and self.container is not None:
            raise ValueError("venv: excludes container. Fix: keep one of them")
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise ValueError("ranks_per_node: is needed where gpus_per_node is 0. Fix: add ranks_per_node: 1")
        if 0 < self.gpus_per_node < self.ranks_of_node:
            problem = f"{self.ranks_of_node} ranks share {self.gpus_per_node} GPUs"
            raise ValueError(f"ranks_per_node: {problem}. Fix: set it to {self.gpus_per_node} or less")
        return self

    @property
    def ranks_of_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node


def load_cluster(file: Path, changed: Mapping[str, object] | None = None) -> Cluster:
    """Read a cluster file.

    Args:
        file: YAML.
        changed: keys in place of the file's.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value that does not belong; names the key and the fix.
    """
    raw = {**_read(file), **(changed or {})}
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, file) from error


def _read(file: Path) -> dict[str, Any]:
    example = "start from an example in slurm/clusters of the source tree"
    try:
        value = yaml_text.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such cluster file", field=str(file), fix=f"check the path, or {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read as a cluster file ({error})"
        raise UserError(problem, field=str(file), fix="give a YAML text file") from error
    except yaml.YAMLError as error:
        problem = f"is not YAML ({yaml_text.describe_error(error)})"
        raise UserError(problem, field=str(file), fix="correct that line") from error
    if not isinstance(value, dict):
        raise UserError("holds no cluster settings", field=str(file), fix=f"write key: value lines, or {example}")
    return value


def _explain(error: ValidationError, file: Path) -> UserError:
    """The most telling problem; a misspelt key shows up as unknown and as missing, and the unknown one has the fix."""
    detail = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    keys = [str(key) for key in detail["loc"] if key != "[key]"]
    path = ".".join(keys)
    field = f"{file}: {path}" if path else str(file)
    if detail["type"] == "extra_forbidden":
        return UserError("unknown key", field=field, fix=_near(keys))
    if detail["type"] == "missing":
        return UserError("is required", field=field, fix=f"add {path} to the cluster file")
    if detail["type"] == "value_error":
        return UserError(str(detail["ctx"]["error"]), field=str(file))
    pattern = detail.get("ctx", {}).get("pattern")
    if detail["type"] == "string_type":
        belongs = "text, in quotes"  # YAML reads 4:00:00 and 0 as numbers
    else:
        belongs = _BELONGS.get(pattern, _ONE_LINE) if pattern else expected_words(detail)
    return UserError(f"{given_words(detail['input'])}, expected {belongs}", field=field, fix=f"set {path} to {belongs}")


def _near(keys: list[str]) -> str:
    model: type[BaseModel] = ContainerSection if keys[0] == "container" and len(keys) > 1 else Cluster
    fields: Mapping[str, object] = model.model_fields
    near = difflib.get_close_matches(keys[-1], list(fields), n=1, cutoff=0.6)
    prefix = ".".join(keys[:-1])
    return (
        f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"keys of {prefix or 'it'}: {', '.join(fields)}"
    )
