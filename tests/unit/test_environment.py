"""The set-up scripts: which Python is found, what uv is told about the index, what is refused."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ENVIRONMENT = Path(__file__).resolve().parents[2] / "environment"


@pytest.fixture(scope="module")
def uv_settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uv_settings", ENVIRONMENT / "uv_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def empty_machine(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine with a shell and no Python at all."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sh", "cat"):
        (commands / name).symlink_to(shutil.which(name) or name)
    return {"PATH": str(commands), "HOME": str(tmp_path / "home")}


def find_python(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ENVIRONMENT / "find-python.sh"], env=environment, check=False, capture_output=True, text=True, timeout=60
    )


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_python_the_message_says_how_to_get_one(empty_machine: dict[str, str]) -> None:
    result = find_python(empty_machine)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "uv python install 3.12" in result.stderr


@pytest.mark.parametrize(
    "place",
    ["bin/python3.12", "bin/python3", "home/.pyenv/versions/3.12.1/bin/python3.12",
     "home/.local/share/uv/python/cpython-3.12.1-linux-x86_64-gnu/bin/python3.12"],
)  # fmt: skip
def test_python_is_found_in_every_place(empty_machine: dict[str, str], tmp_path: Path, place: str) -> None:
    executable(tmp_path / place, f'exec {sys.executable} "$@"')
    result = find_python(empty_machine)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_a_shim_that_fails_is_passed_over(empty_machine: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin/python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    executable(tmp_path / "home/.pyenv/versions/3.12.9/bin/python3.12", f'exec {sys.executable} "$@"')
    result = find_python(empty_machine)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_a_python_that_was_asked_for_and_does_not_work_is_an_error(empty_machine: dict[str, str]) -> None:
    result = find_python({**empty_machine, "PYTHON": "/nonexistent/python"})
    assert result.returncode == 2
    assert "PYTHON=/nonexistent/python" in result.stderr


def test_an_unknown_set_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    command = [ENVIRONMENT / "install.sh", tmp_path / "venv", "set-z"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "set-a.txt set-b.txt" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_pip_sections_override_in_pips_order(uv_settings: ModuleType) -> None:
    listing = (
        ":env:.index-url='https://env.example/simple'\n"
        "global.index-url='https://global.example/simple'\n"
        "global.find-links='/wheels /more'\n"
        "install.find-links='/wheels'\n"
    )
    assert uv_settings.pip_options(listing) == {"index-url": "https://env.example/simple", "find-links": "/wheels"}


def test_uv_gets_pips_index_and_keeps_its_own_settings(uv_settings: ModuleType) -> None:
    options = {
        "index-url": "https://user:p$ss@mirror.example/simple",
        "extra-index-url": "file:///a\nfile:///b",
        "find-links": "/wheels /more",
        "timeout": "60",
    }
    lines = uv_settings.exports(options, {"UV_INDEX": "https://mine.example/simple"})
    assert lines == [
        "export UV_DEFAULT_INDEX='https://user:p$ss@mirror.example/simple'",
        "export UV_FIND_LINKS=/wheels,/more",
        "export UV_INDEX_STRATEGY=unsafe-best-match",
    ]
