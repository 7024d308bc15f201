"""Recipe files in, recipes out: YAML, dotted overrides, the resolved text, differences. All errors are `UserError`."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from megatron_klrl.config import yaml_text
from megatron_klrl.config.explain import explain
from megatron_klrl.config.presets import find_preset
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One setting that two recipes disagree on; a side that lacks the setting has None.

    Attributes:
        path: dotted key.
        left: value in the first recipe.
        right: value in the second recipe.
    """

    path: str
    left: object
    right: object


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply dotted overrides.

    Args:
        path: YAML file.
        overrides: texts ``a.b=value`` with the value in YAML; later ones win.

    Raises:
        UserError: no such file, not YAML, not a mapping, a key unknown, or a value of the wrong type; names the dotted
            key or the file, and the fix.
    """
    file = Path(path)
    raw = _with_file_preset(read_mapping(file))
    for override in _presets_first(overrides):
        _apply(raw, override)
        if _names_preset(override):
            _merge(raw, find_preset(raw["preset"]).sections())
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise explain(error, raw) from error


def _with_file_preset(raw: dict[str, object]) -> dict[str, object]:
    """The preset a file names, under the file's own keys."""
    if raw.get("preset") is None:
        return raw
    merged: dict[str, object] = dict(find_preset(raw["preset"]).sections())
    _merge(merged, raw)
    return merged


def _presets_first(overrides: Sequence[str]) -> list[str]:
    """A preset of the command line replaces what the file says, and stays under the other overrides beside it."""
    return sorted(overrides, key=lambda override: not _names_preset(override))


def _names_preset(override: str) -> bool:
    return override.partition("=")[0].strip() == "preset"


def _merge(target: dict[str, object], source: Mapping[str, object]) -> None:
    """Put the source's keys into the target, section by section."""
    for key, value in source.items():
        inside = target.get(key)
        if isinstance(inside, dict) and isinstance(value, Mapping):
            _merge(inside, value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that loads to the same recipe."""
    return yaml_text.render(recipe.model_dump(mode="json"))


def settings(recipe: Recipe) -> list[tuple[str, object]]:
    """Every setting: dotted key and plain value, in the order of the recipe."""
    return list(_leaves(recipe.model_dump(mode="json"), ""))


def diff_recipes(left: Recipe, right: Recipe) -> list[Difference]:
    """Settings in which two recipes differ, in the order of the recipe."""
    a = dict(_leaves(left.model_dump(mode="json"), ""))
    b = dict(_leaves(right.model_dump(mode="json"), ""))
    paths = [*a, *(path for path in b if path not in a)]
    return [
        Difference(path=p, left=a.get(p), right=b.get(p)) for p in paths if (p in a, a.get(p)) != (p in b, b.get(p))
    ]


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def read_mapping(file: Path) -> dict[str, object]:
    """The sections of a YAML file.

    Raises:
        UserError: no such file, not YAML, or not sections; names the file, and neighbours of nearly that name.
    """
    try:
        value = yaml_text.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(file) from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError, NotADirectoryError) as error:
        raise UserError(
            f"cannot be read as a recipe ({error})", field=str(file), fix="give a YAML text file"
        ) from error
    except yaml.YAMLError as error:
        problem = f"is not YAML ({yaml_text.describe_error(error)})"
        raise UserError(problem, field=str(file), fix="correct that line") from error
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds {_kind(value)}, not sections"
        raise UserError(found, field=str(file), fix="write sections like 'model: {path: embedded:arithmetic}'")
    return value


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"


def _missing(file: Path) -> UserError:
    folder = file.parent
    if not folder.is_dir():
        return UserError("no such file, nor its folder", field=str(file), fix=f"check the path {folder}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES)
    near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.5)
    if near:
        fix = "did you mean " + " or ".join(str(folder / name) for name in near) + "?"
    elif names:
        fix = f"recipes in {folder}: {', '.join(names[:8])}"
    else:
        fix = f"{folder} holds no .yaml file; give the path of a recipe"
    return UserError("no such file", field=str(file), fix=fix)


def _apply(raw: dict[str, object], override: str) -> None:
    """Set one dotted key in the raw mapping, making the sections on the way."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError("is not an override", field=repr(override), fix="write key=value, for example kl.beta=0.1")
    try:
        value = yaml_text.parse(text)
    except yaml.YAMLError as error:
        problem = f"the value {text!r} is not YAML ({yaml_text.describe_error(error)})"
        raise UserError(problem, field=path, fix=f"quote it: {path}='\"...\"'") from error
    section = raw
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            above = ".".join(keys[:depth])
            raise UserError(f"{above} is {inner!r}, not a section", field=path, fix=f"override {above} itself")
        section = inner
    section[keys[-1]] = value
