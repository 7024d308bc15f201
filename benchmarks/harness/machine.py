"""Where and with what a figure was measured. Standard library only."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "torch",
    "triton",
    "megatron-core",
    "trl",
    "verl",
    "liger-kernel",
    "cut-cross-entropy",
    "openrlhf",
    "transformers",
    "numpy",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    model = _first(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$")
    memory = _first(Path("/proc/meminfo"), r"^MemTotal:\s*(\d+) kB$")
    return {
        "cpu": model or platform.processor(),
        "cores": cores(),
        "memory_gib": round(int(memory) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of every library that is installed here."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The checkout's commit, and how many of the files that matter differ from it; empty outside a repository."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return {}
    changed = _git("status", "--porcelain", "--", "megatron_klrl", "benchmarks", ":!benchmarks/results").splitlines()
    return {"commit": head, "changed_files": len(changed)}


def has_cuda() -> bool:
    """Whether torch sees a GPU; asked in another process, because importing torch here would take seconds."""
    program = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _first(path: Path, pattern: str) -> str:
    if not path.exists():
        return ""
    found = re.search(pattern, path.read_text(), flags=re.MULTILINE)
    return found.group(1).strip() if found else ""
