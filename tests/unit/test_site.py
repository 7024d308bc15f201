"""Documents that agree with the code: generated pages, links, commands and files that they show."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from typer.main import get_command

from megatron_klrl.cli.main import app
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.study import StudyFile
from tests.unit.cli.programs import klrl_here

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
assert _spec is not None
assert _spec.loader is not None
make_pages: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_pages)


@pytest.mark.parametrize("name", make_pages.PAGES)
def test_a_page_made_from_code_is_current(name: str) -> None:
    """Make it again: python docs/make_pages.py."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make_pages.PAGES[name]()


def test_every_recipe_key_is_on_its_page() -> None:
    text = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    for key in ("kl.beta", "loop.max_staleness", "reference.measure", "generation.kv_cache_mib", "collapse_below"):
        assert f"| `{key}` |" in text


def test_every_page_is_in_the_navigation_and_nothing_else() -> None:
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = sorted(_leaves(yaml.safe_load(text)["nav"]))
    assert listed == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


def _leaves(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [leaf for part in inner for leaf in _leaves(part)]  # type: ignore[attr-defined]


def test_links_lead_somewhere_on_the_site() -> None:
    broken = []
    for page in PAGES[1:]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if "://" not in link and (not target.exists() or not target.is_relative_to(ROOT / "docs")):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def commands() -> list[tuple[str, str]]:
    """Every `klrl` command line in a code block, by page; placeholders are in capitals, optional parts in brackets."""
    found = []
    for page in PAGES:
        for block in re.findall(r"(?ms)^```(?:console|bash|sh)\n(.*?)^```", page.read_text(encoding="utf-8")):
            lines = [line.removeprefix("$ ").removeprefix(".venv/bin/") for line in block.splitlines()]
            found += [(str(page.relative_to(ROOT)), line) for line in lines if line.startswith("klrl ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_commands_parse(page: str, line: str) -> None:
    words = shlex.split(re.sub(r"\[[^\]]*\]|\.\.\.", " ", line), comments=True)[1:]
    command, name = get_command(app), "klrl"
    while isinstance(command, click.Group) and words:
        name, rest = words[0], words[1:]
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{page}: no command {name}"
        command, words = found, rest
    assert not isinstance(command, click.Group), f"{page}: {line} names no command"
    command.make_context(name, list(words))


@pytest.mark.parametrize(
    "line", sorted({line for _, line in commands() if re.match(r"klrl (train|study|config show) examples/", line)})
)
def test_documented_recipes_would_run(line: str) -> None:
    """Or are refused, where the text around them says so; a model that is not here is taken from the package."""
    words = [word for word in shlex.split(line, comments=True)[1:] if not word.startswith("model.path=")]
    on_cpu = any("_cpu" in word for word in words)
    if not on_cpu:
        load_recipe(words[1], [word for word in words[2:] if "=" in word])
        return
    dry = [] if words[0] == "config" or "--dry-run" in words else ["--dry-run"]
    done = klrl_here(*words, *dry, cwd=ROOT)
    if words[-1] == "kl.estimator=k3":
        assert done.exit_code == 2
        assert "kl.allow_biased=true" in done.stderr
    else:
        assert done.exit_code == 0, done.stderr


def test_the_study_on_the_page_is_one() -> None:
    text = (ROOT / "docs/guide/studies.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?ms)^```yaml\n(.*?)^```", text)
    study = StudyFile.model_validate(yaml.safe_load(block))
    assert list(study.cells) == ["none", "k1-reward"]
