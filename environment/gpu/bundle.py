"""Packages for a machine without internet: fetch what it lacks, cut it into parts, join these there, install.

On a machine with internet, with the list that ``pip freeze`` printed on the other one::

    python environment/gpu/bundle.py fetch --pins environment/gpu/gpu.txt --have node.txt --to wheels
    python environment/gpu/bundle.py pack wheels --to bundle --part-mib 56

Carry the folder ``bundle`` over, and there::

    python environment/gpu/bundle.py install bundle --python .venv/bin/python

Every file carries its hash: what arrives damaged or incomplete is named, and nothing is installed. Standard library
only.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "bundle.json"
_CHUNK = 1 << 20


class BundleError(Exception):
    """Something is missing or damaged; the message says what to do."""


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    """Versions by name, from a pin file with hashes or from what ``pip freeze`` printed."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {normalised(name): version for name, version in found}


def missing(pins: str, have: str) -> str:
    """The entries of a pin file, hashes included, that are not there in that version.

    A local version counts as the release it is a build of: torch 2.11.0+cu130 is 2.11.0.
    """
    there = {name: version.partition("+")[0] for name, version in pinned(have).items()}
    entries = [entry for entry in re.split(r"^(?=[A-Za-z0-9])", pins, flags=re.MULTILINE) if "==" in entry]
    wanted = [entry for entry in entries if not pinned(entry).items() <= there.items()]
    return "".join(wanted)


def fetch(pins: Path, have: Path | None, to: Path) -> int:
    """Download what is missing, with pip's own configuration; the number of packages.

    Raises:
        BundleError: pip failed.
    """
    entries = missing(pins.read_text(encoding="utf-8"), have.read_text(encoding="utf-8") if have else "")
    count = len(pinned(entries))
    if count == 0:
        return 0
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(entries)
        file.flush()
        options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(to)]
        _pip(sys.executable, ["download", *options, "--requirement", file.name])
    return count


def pack(wheels: Path, to: Path, *, part_bytes: int) -> int:
    """Copy wheels into a new folder, large ones in parts, with a manifest of their hashes; the number of wheels.

    Raises:
        BundleError: there is nothing to pack, or the folder is in use.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise BundleError(f"{wheels} holds no wheels")
    if to.exists() and any(to.iterdir()):
        raise BundleError(f"{to} is not empty: give a new folder")
    to.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for wheel in found:
        parts = _cut(wheel, to, part_bytes)
        manifest[wheel.name] = {"sha256": _digest([wheel]), "parts": [part.name for part in parts]}
    (to / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return len(found)


def _cut(wheel: Path, to: Path, part_bytes: int) -> list[Path]:
    if wheel.stat().st_size <= part_bytes:
        return [Path(shutil.copy(wheel, to / wheel.name))]
    parts = []
    with wheel.open("rb") as source:
        while piece := source.read(part_bytes):
            part = to / f"{wheel.name}.part{len(parts):03d}"
            part.write_bytes(piece)
            parts.append(part)
    return parts


def join(bundle: Path, to: Path) -> list[tuple[Path, str]]:
    """Put the wheels together again; each with its hash.

    Raises:
        BundleError: a part is missing, or a wheel is not what was packed.
    """
    file = bundle / MANIFEST
    if not file.is_file():
        raise BundleError(f"{bundle} has no {MANIFEST}: it is no bundle, or it did not arrive whole")
    to.mkdir(parents=True, exist_ok=True)
    joined = []
    for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
        parts = [bundle / part for part in entry["parts"]]
        absent = [part.name for part in parts if not part.is_file()]
        if absent:
            raise BundleError(f"{', '.join(absent)} did not arrive: copy it again")
        if _digest(parts) != entry["sha256"]:
            raise BundleError(f"{name} is not what was packed: copy its parts again ({', '.join(entry['parts'])})")
        wheel = to / name
        with wheel.open("wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
        joined.append((wheel, entry["sha256"]))
    return joined


def _digest(parts: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    return digest.hexdigest()


def install(bundle: Path, *, python: str, target: Path | None = None) -> int:
    """Install every wheel of a bundle, resolving and fetching nothing; the number of wheels.

    Args:
        bundle: that ``pack`` wrote.
        python: of the environment.
        target: a folder to install into, for environments that must not be written to; it goes on PYTHONPATH.

    Raises:
        BundleError: the bundle is not whole, or pip failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheels = join(bundle, Path(folder) / "wheels")
        requirements = Path(folder) / "requirements.txt"
        lines = [f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in wheels]
        requirements.write_text("".join(lines), encoding="utf-8")
        where = ["--target", str(target)] if target is not None else []
        options = ["--no-index", "--no-deps", "--require-hashes", *where]
        _pip(python, ["install", *options, "--requirement", str(requirements)])
    return len(wheels)


def _pip(python: str, arguments: list[str]) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip {arguments[0]} failed:\n{done.stdout}{done.stderr}".rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download what is missing")
    one.add_argument("--pins", type=Path, required=True)
    one.add_argument("--have", type=Path, help="what pip freeze printed on the other machine")
    one.add_argument("--to", type=Path, required=True)
    one = commands.add_parser("pack", help="cut wheels into parts")
    one.add_argument("wheels", type=Path)
    one.add_argument("--to", type=Path, required=True)
    one.add_argument("--part-mib", type=int, default=56)
    one = commands.add_parser("install", help="put parts together and install")
    one.add_argument("bundle", type=Path)
    one.add_argument("--python", default=sys.executable)
    one.add_argument("--target", type=Path)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "fetch":
            count = fetch(given.pins, given.have, given.to)
        elif given.command == "pack":
            count = pack(given.wheels, given.to, part_bytes=max(1, given.part_mib) << 20)
        else:
            count = install(given.bundle, python=given.python, target=given.target)
    except BundleError as error:
        sys.stderr.write(f"bundle: {error}\n")
        return 2
    sys.stdout.write(f"bundle: {given.command}: {count} packages\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
