"""Rules of the house that no linter knows: sizes, names, and documents that agree with the code."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_klrl
from megatron_klrl.kl.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "megatron_klrl").rglob("*.py"))
CODE = sorted(
    path for folder in ("megatron_klrl", "examples", "tests", "environment") for path in (ROOT / folder).rglob("*.py")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# Distribution to import name, where they differ.
IMPORT_NAMES = {"megatron-core": "megatron", "pyyaml": "yaml"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function of a module, decorators and docstring left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            signature = node.body[0].lineno - node.lineno
            yield node.name, signature + (node.end_lineno or first.lineno) - first.lineno + 1


def make_targets() -> set[str]:
    """Targets that the Makefile has a rule for."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def tree_paths() -> list[Path]:
    """Paths of the README's tree, relative to the repository; two spaces of indent are one level down."""
    tree = README.split("## Tree")[1].split("```")[1]
    paths: list[Path] = []
    folder = Path()
    for line in filter(str.strip, tree.splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if line.startswith("  "):
            paths += [folder / name for name in names]
        else:
            folder = Path(names[0])
            paths += [Path(name) for name in names]
    return paths


def test_modules_stay_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > MAX_MODULE_LINES} == {}


def test_functions_stay_small() -> None:
    sizes = {f"{path.relative_to(ROOT)}:{name}": size for path in CODE for name, size in functions(path)}
    longest = sorted(sizes.items(), key=lambda item: -item[1])[:10]
    sys.stdout.write("".join(f"{size:4d} {name}\n" for name, size in longest))
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


def test_no_module_is_a_drawer() -> None:
    drawers = [
        path for path in CODE if FORBIDDEN_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert drawers == []


def test_changelog_starts_with_the_package_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == megatron_klrl.__version__


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "environment/README.md"])
def test_documented_make_commands_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL)
    named = {target for piece in code for target in re.findall(r"\bmake ([a-z-]+)", piece)}
    assert named
    assert named <= make_targets()


def test_readme_names_the_command_that_make_train_runs() -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "train"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    command = plan.stdout.splitlines()[-1].strip()
    assert command.startswith(".venv/bin/klrl train ")
    assert f"`{command}`" in README
    assert (ROOT / command.split()[-1]).is_file()


def test_readme_names_real_commands() -> None:
    script = subprocess.run(
        [sys.executable, "-m", "megatron_klrl.cli.main", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=wide_terminal(),
    )
    block = README.split("## Commands")[1].split("```")[1]
    named = re.findall(r"^klrl (\w+)", block, flags=re.MULTILINE)
    assert named
    assert [name for name in named if not re.search(rf"\b{name}\b", script.stdout)] == []


def wide_terminal() -> dict[str, str]:
    """The environment, with room enough that no help line is cut."""
    return {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}


def test_every_path_of_the_readme_tree_exists() -> None:
    paths = tree_paths()
    assert Path("megatron_klrl/kl/") in paths
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []


def test_every_package_is_in_the_readme_tree() -> None:
    packages = {Path("megatron_klrl") / path.parent.name for path in (ROOT / "megatron_klrl").glob("*/__init__.py")}
    assert packages
    assert packages - set(tree_paths()) == set()


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_verdicts_are_the_catalogues() -> None:
    rows = re.findall(r"^\| `([a-z0-9_/]+)` \| (\w+) \| (\w+) \|", README, flags=re.MULTILINE)
    verdicts = {entry.name: (str(entry.verdict_sequence), str(entry.verdict_token)) for entry in catalogue()}
    assert len(rows) > 10
    assert {name: (sequence, token) for name, sequence, token in rows} == {
        name: verdicts.get(name) for name, _, _ in rows
    }


@pytest.mark.parametrize("name", ["set-a", "set-b"])
def test_pin_files_are_hashed_and_name_no_index(name: str) -> None:
    text = (ROOT / "environment" / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*--?(i|index-url|extra-index-url|find-links|f)\b", text, flags=re.MULTILINE)
    pins = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    assert len(pins) > 100
    assert [
        pin.split()[0] for pin in pins if not re.match(r"[\w.\-\[\]]+==\S+ \\\n\s+--hash=sha256:[0-9a-f]{64}", pin)
    ] == []


def test_both_sets_hold_the_same_tools() -> None:
    tools = [line for line in (ROOT / "environment/dev.in").read_text(encoding="utf-8").splitlines() if "==" in line]
    assert tools
    for name in ("set-a", "set-b"):
        pins = (ROOT / "environment" / f"{name}.txt").read_text(encoding="utf-8")
        assert [tool for tool in tools if f"\n{tool.lower()} \\" not in f"\n{pins}"] == []


def test_pinned_versions_satisfy_the_projects_bounds() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pins = dict(
        re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "environment/set-a.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    requirements = [Requirement(line) for line in wanted]
    assert requirements
    assert [str(each) for each in requirements if not each.specifier.contains(pins[each.name.lower()])] == []


def test_every_dependency_is_imported_and_documented() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=]", line)[0] for line in wanted]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    document = (ROOT / "docs/design/dependencies.md").read_text(encoding="utf-8")
    # SummaryWriter lives in torch and needs the tensorboard distribution.
    reached = {name: rf"^\s*(from|import) (torch\.utils\.)?{IMPORT_NAMES.get(name, name)}\b" for name in names}
    assert [name for name in names if not re.search(reached[name], sources, flags=re.MULTILINE)] == []
    assert [name for name in names if f"| {name} |" not in document] == []


@pytest.mark.parametrize(
    "module",
    [
        "megatron_klrl.config.load",
        "megatron_klrl.config.validate",
        "megatron_klrl.launch.local",
        "megatron_klrl.cli.main",
        "megatron_klrl.kl.config",
    ],
)
def test_login_node_needs_no_torch(module: str) -> None:
    heavy = "{'torch', 'megatron', 'vllm', 'transformers'}"
    program = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
