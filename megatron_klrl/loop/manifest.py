"""What a checkpoint consists of: every file with its size and checksum, so that a damaged or foreign one is seen.

Written last. The ranks share the reading, for a checkpoint is as large as model and optimizer.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST = "manifest.json"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The value by which checkpoints are compared.

    Attributes:
        metric: its name.
        value: in the step of the checkpoint.
    """

    metric: str
    value: float


def write(folder: Path, measured: Measured | None) -> None:
    """Write the manifest of a folder that holds everything else; collective."""
    names = told(_files(folder) if dist.get_rank() == 0 else None)
    entries = _gathered({name: _entry(folder / name) for name in _share(names)})
    if dist.get_rank() != 0:
        return
    value = None if measured is None else {"metric": measured.metric, "value": measured.value}
    content = {"measured": value, "files": dict(sorted(entries.items()))}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def first_problem(folder: Path) -> str | None:
    """What of a checkpoint is not as it was written, in words; None if all is. The same on every rank; collective."""
    found = told(_plan(folder) if dist.get_rank() == 0 else None)
    if isinstance(found, str):
        return found
    problems = _gathered({name: _difference(folder, name, found[name]) for name in _share(sorted(found))})
    return next((problems[name] for name in sorted(problems) if problems[name]), None)


def measured(folder: Path, metric: str) -> float | None:
    """What a checkpoint's manifest says of a metric; None if nothing."""
    try:
        value = _read(folder)["measured"]
        return float(value["value"]) if value is not None and value["metric"] == metric else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plan(folder: Path) -> dict[str, Any] | str:
    """The entries to compare, by file; or what is wrong before any file is read."""
    try:
        wanted: dict[str, Any] = _read(folder)["files"]
        names = set(wanted)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror}): not complete, or not a checkpoint of this program"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    present = set(_files(folder))
    if names - present:
        return f"{min(names - present)} is missing"
    if present - names:
        return f"{min(present - names)} does not belong to it"
    return wanted


def _difference(folder: Path, name: str, wanted: Any) -> str | None:
    try:
        found = _entry(folder / name, bytes_wanted=wanted["bytes"])
        if found["bytes"] != wanted["bytes"]:
            return f"{name} has {found['bytes']} bytes, {wanted['bytes']} were written"
        return None if found == wanted else f"{name} is not what was written (checksum)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (KeyError, TypeError):
        return f"{MANIFEST} is damaged"


def _entry(file: Path, *, bytes_wanted: int | None = None) -> dict[str, Any]:
    """Size and checksum; without checksum where the size says enough."""
    size = file.stat().st_size
    if bytes_wanted is not None and size != bytes_wanted:
        return {"bytes": size}
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return content


def _files(folder: Path) -> list[str]:
    """Files below a folder, the manifest left out, by their path within it."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in (str(path.relative_to(folder)) for path in found) if name != MANIFEST)


def _share(names: Sequence[str]) -> Sequence[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def told[T](value: T | None) -> T:
    """What rank 0 knows, on every rank."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered[T](mine: Mapping[str, T]) -> dict[str, T]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, dict(mine))
    return {name: value for part in parts for name, value in part.items()}
