"""The rules of tests/unit/test_house.py for benchmarks/, and the pins of the peers' environment."""

import re
from pathlib import Path

from tests.unit.test_house import FORBIDDEN_NAMES, MAX_FUNCTION_LINES, MAX_MODULE_LINES, functions

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "environment" / f"{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))


def test_sources_stay_small() -> None:
    assert len(SOURCES) > 20
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    sizes = {f"{path.name}:{name}": size for path in SOURCES for name, size in functions(path)}
    assert {name: size for name, size in lines.items() if size > MAX_MODULE_LINES} == {}
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


def test_no_source_is_a_drawer() -> None:
    assert [path for path in SOURCES if FORBIDDEN_NAMES & {path.stem, path.parent.name}] == []


def test_the_directing_process_imports_no_torch() -> None:
    """All of the harness but what runs in a contestant's process."""
    in_contestants = {"worker.py", "meters.py", "ceilings.py", "parity.py", "ranks.py"}
    harness = [
        path for path in SOURCES if path.parent.name in {"harness", "suites"} and path.name not in in_contestants
    ]
    assert len(harness) > 8
    assert [path for path in harness if re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE)] == []


def test_pins_are_hashed_and_name_no_index() -> None:
    text = (ROOT / "environment/bench.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*--?(i|index-url|extra-index-url|find-links|f)\b", text, flags=re.MULTILINE)
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    assert len(parts) > 50
    assert [
        part.split()[0] for part in parts if not re.match(r"\S+==\S+ \\\n\s+--hash=sha256:[0-9a-f]{64}", part)
    ] == []


def test_what_both_environments_hold_has_one_version() -> None:
    trainer, peers = pins("set-a"), pins("bench")
    shared = trainer.keys() & peers.keys()
    assert {"torch", "megatron-core", "transformers", "numpy", "uv"} <= shared
    # verl's configuration library takes this parser's old format alone, in which math-verify misreads per cent; no
    # benchmark reads mathematics
    apart = {"antlr4-python3-runtime": ("4.13.2", "4.9.3")}
    assert {name: (trainer[name], peers[name]) for name in shared if trainer[name] != peers[name]} == apart
