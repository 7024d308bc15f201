from pathlib import Path

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.launch import devices
from megatron_klrl.launch.devices import capabilities, decide_ranks, visible_gpus
from tests.unit.config.folders import make_recipe


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ([], 0, 1),
        (["parallel.tensor=2", "parallel.pipeline=2"], 0, 4),
        (["parallel.tensor=2", "generation.tensor=3"], 0, 6),
        (["parallel.tensor=2"], 8, 8),
        (["parallel.tensor=2", "launch.ranks=4"], 8, 4),
        (["launch.ranks=3"], 0, 3),
    ],
)
def test_ranks_of_this_machine(tmp_path: Path, overrides: list[str], gpus: int, expected: int) -> None:
    assert decide_ranks(load_recipe(make_recipe(tmp_path), overrides), gpus=gpus) == expected


def fake_driver(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("variable", "expected"), [(None, 2), ("", 0), ("1", 1), ("0,1,2", 2), ("-1", 0), ("1,-1,0", 1), ("GPU-b,", 1)]
)
def test_gpus_by_driver_and_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: int
) -> None:
    # The engine build here is the CPU's; that rule has its own test below.
    monkeypatch.setattr(devices, "_cpu_build", lambda: False)
    fake_driver(tmp_path, "GPU 0: X (UUID: GPU-a)\n  MIG 1g: (UUID: MIG-c)\nGPU 1: X (UUID: GPU-b)", monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == expected


def test_a_driver_without_devices_means_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cpu_build", lambda: False)
    fake_driver(tmp_path, "No devices were found", monkeypatch)
    assert visible_gpus() == 0


def test_a_cpu_build_uses_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, "GPU 0: X", monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu = devices._cpu_build()
    assert visible_gpus() == (0 if cpu else 1)


@pytest.mark.parametrize(
    ("chosen", "answer", "expected"),
    [
        ("0,1", "9.0\n9.0", ((9, 0), (9, 0))),
        ("0", "9.0\n8.0", ((9, 0),)),
        ("", "9.0\n9.0", ()),
        ("0,1", "Field not found", ()),
    ],
)
def test_capabilities_are_the_drivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, answer: str, expected: tuple[tuple[int, int], ...]
) -> None:
    monkeypatch.setattr(devices, "_cpu_build", lambda: False)
    program = tmp_path / "nvidia-smi"
    gpus = "printf 'GPU 0: X\\nGPU 1: X\\n'"
    program.write_text(f"#!/bin/sh\ncase $1 in --query*) printf '{answer}\\n' ;; *) {gpus} ;; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert capabilities() == expected
