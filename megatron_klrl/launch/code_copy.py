"""The sources a job runs, copied beside its run: what is edited while the job waits or trains does not reach it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_klrl.errors import WorkError
from megatron_klrl.tracking.card import COMMIT_FILE

_GIT_TIMEOUT_S = 60.0
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """A git checkout that this package runs from.

    Attributes:
        root: of the checkout.
        files: it tracks and has, relative.
        commit: it stands at, with ``-dirty`` after local changes.
        untracked: files it neither tracks nor ignores.
    """

    root: Path
    files: tuple[Path, ...]
    commit: str
    untracked: tuple[Path, ...]


def find_sources(package: Path = _PACKAGE) -> Sources | None:
    """The checkout that holds a package; None if it was installed, or runs from a copy, and nothing tracks it."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    root = Path(top.strip())
    files = _listed(root)
    if package.resolve() / "__init__.py" not in {(root / file).resolve() for file in files}:
        return None
    described = _git(root, "describe", "--always", "--dirty", "--abbrev=12") or "no commit yet"
    untracked = _listed(root, "--others", "--exclude-standard")
    return Sources(root=root, files=files, commit=described.strip(), untracked=untracked)


def copy_sources(sources: Sources, to: Path) -> None:
    """Copy the tracked files, with the local changes they have; an earlier copy is replaced.

    Raises:
        WorkError: a file cannot be copied.
    """
    draft = to.with_name(f".{to.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for file in sources.files:
            target = draft / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sources.root / file, target)
        (draft / COMMIT_FILE).write_text(sources.commit + "\n", encoding="utf-8")
        shutil.rmtree(to, ignore_errors=True)
        draft.rename(to)
    except OSError as error:
        raise WorkError(f"the sources cannot be copied to {to}: {error}") from error


def _listed(root: Path, *which: str) -> tuple[Path, ...]:
    names = _git(root, "ls-files", "-z", *which) or ""
    return tuple(Path(name) for name in names.split("\0") if name and (root / name).is_file())


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
