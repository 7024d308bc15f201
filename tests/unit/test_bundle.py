"""Packages for a machine without internet: small real wheels, cut, carried, joined and installed without an index."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    """The script, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "environment" / "gpu" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = load()


def make_wheel(folder: Path, name: str, *, filler: int = 0) -> Path:
    """A pure wheel with one module that says its name."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\nFILLER = {'x' * filler!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    make_wheel(tmp_path / "wheels", "klrl_small")
    make_wheel(tmp_path / "wheels", "klrl_large", filler=5000)
    assert bundle.pack(tmp_path / "wheels", tmp_path / "bundle", part_bytes=2000) == 2
    return tmp_path / "bundle"


def test_parts_join_to_what_they_were_cut_from(packed: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in packed.iterdir() if file.name != bundle.MANIFEST]
    assert max(sizes) <= 2000
    assert len(sizes) > 3
    for wheel, digest in bundle.join(packed, tmp_path / "joined"):
        assert wheel.read_bytes() == (tmp_path / "wheels" / wheel.name).read_bytes()
        assert len(digest) == 64


def test_a_bundle_installs_without_an_index(packed: Path, tmp_path: Path) -> None:
    program = [sys.executable, ROOT / "environment/gpu/bundle.py", "install", packed, "--target", tmp_path / "site"]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = "import klrl_small, klrl_large; print(klrl_small.NAME, klrl_large.NAME, len(klrl_large.FILLER))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["klrl_small", "klrl_large", "5000"]


def test_what_arrives_damaged_or_not_at_all_is_named_and_nothing_is_installed(packed: Path, tmp_path: Path) -> None:
    part = sorted(packed.glob("klrl_large*.part*"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(bundle.BundleError, match=r"klrl_large.* is not what was packed: copy its parts again"):
        bundle.install(packed, python=sys.executable, target=tmp_path / "site")
    part.unlink()
    with pytest.raises(bundle.BundleError, match=rf"{part.name} did not arrive"):
        bundle.install(packed, python=sys.executable, target=tmp_path / "site")
    (packed / bundle.MANIFEST).unlink()
    with pytest.raises(bundle.BundleError, match=r"no bundle, or it did not arrive whole"):
        bundle.join(packed, tmp_path / "joined")
    assert not (tmp_path / "site").exists()


def test_a_manifest_names_every_file(packed: Path) -> None:
    manifest = json.loads((packed / bundle.MANIFEST).read_text())
    named = {part for entry in manifest.values() for part in entry["parts"]} | {bundle.MANIFEST}
    assert {file.name for file in packed.iterdir()} == named


def test_only_what_is_missing_is_fetched() -> None:
    entries = {"a==1.0": "1", "b-c==2.0": "2", "torch==2.11.0": "4"}
    pins = "".join(f"{name} \\\n    --hash=sha256:{digest}\n" for name, digest in entries.items())
    left = bundle.missing(pins, "B_C==2.0\ntorch==2.11.0+cu130\na==0.9\n")
    assert bundle.pinned(left) == {"a": "1.0"}
    assert "sha256:1" in left
    assert "sha256:2" not in left
    assert bundle.pinned(bundle.missing(pins, "")) == {"a": "1.0", "b-c": "2.0", "torch": "2.11.0"}


def test_nothing_to_pack_and_a_folder_in_use(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="holds no wheels"):
        bundle.pack(tmp_path, tmp_path / "to", part_bytes=10)
    make_wheel(tmp_path, "klrl_small")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_text("")
    with pytest.raises(bundle.BundleError, match="is not empty"):
        bundle.pack(tmp_path, tmp_path / "to", part_bytes=10)
