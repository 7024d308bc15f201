import subprocess
from pathlib import Path

import pytest

from megatron_klrl.errors import WorkError
from megatron_klrl.launch.code_copy import copy_sources, find_sources
from megatron_klrl.tracking.card import COMMIT_FILE


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a git checkout with one commit."""
    root = tmp_path / "checkout"
    package = root / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return package


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def test_tracked_files_are_copied_as_they_are_now(package: Path, tmp_path: Path) -> None:
    (package / "__init__.py").write_text("value = 2\n")
    (package.parent / "ignored.txt").write_text("no\n")
    (package / "untracked.py").write_text("no\n")
    sources = find_sources(package)
    assert sources is not None
    assert sources.untracked == (Path("pack/untracked.py"),)
    copy_sources(sources, tmp_path / "code")
    files = {str(file.relative_to(tmp_path / "code")) for file in (tmp_path / "code").rglob("*") if file.is_file()}
    assert files == {".gitignore", "pack/__init__.py", COMMIT_FILE}
    assert (tmp_path / "code/pack/__init__.py").read_text() == "value = 2\n"
    assert (tmp_path / "code" / COMMIT_FILE).read_text().strip().endswith("-dirty")


def test_a_later_copy_replaces_the_earlier(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    copy.mkdir()
    (copy / "old.py").touch()
    sources = find_sources(package)
    assert sources is not None
    copy_sources(sources, copy)
    assert not (copy / "old.py").exists()
    assert (copy / "pack" / "__init__.py").exists()


def test_a_file_that_is_deleted_but_tracked_is_no_source(package: Path) -> None:
    (package.parent / ".gitignore").unlink()
    sources = find_sources(package)
    assert sources is not None
    assert sources.files == (Path("pack/__init__.py"),)


def test_no_checkout_and_a_package_that_a_checkout_ignores_have_no_sources(package: Path, tmp_path: Path) -> None:
    outside = tmp_path / "installed"
    outside.mkdir()
    (outside / "__init__.py").touch()
    assert find_sources(outside) is None
    inside = package.parent / ".venv"
    inside.mkdir()
    (inside / "__init__.py").touch()
    assert find_sources(inside) is None


def test_a_copy_that_cannot_be_made_says_so(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sources = find_sources(package)
    assert sources is not None
    with pytest.raises(WorkError, match="cannot be copied"):
        copy_sources(sources, tmp_path / "file" / "code")
