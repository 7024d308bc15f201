"""From a pydantic validation error to one sentence that names the dotted key, what was given and what belongs there."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_klrl.config.data import AnySource
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.errors import UserError

Key = str | int

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "dict_type": "a section (key: value lines)",
    "model_type": "a section (key: value lines)",
    "model_attributes_type": "a section (key: value lines)",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def explain(error: ValidationError, raw: Mapping[str, Any], *, root: type[BaseModel] = Recipe) -> UserError:
    """The most telling problem of a failed validation as a `UserError`, the number of others appended.

    Args:
        error: what pydantic raised for `root`.
        raw: the mapping that was validated.
        root: type of the file.
    """
    # A misspelt key shows up twice, as unknown and as missing; the unknown one carries the suggestion.
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = _explain_one(details[0], raw, root)
    others = {".".join(map(str, _clean(detail["loc"], raw))) for detail in details[1:]} - {first.field}
    if not others:
        return first
    problem = f"{first.problem} (also wrong: {', '.join(sorted(others))})"
    return UserError(problem, field=first.field, fix=first.fix)


def _explain_one(detail: Any, raw: Mapping[str, Any], root: type[BaseModel]) -> UserError:
    keys = _clean(detail["loc"], raw)
    path = ".".join(map(str, keys))
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(keys, raw, root)
    if kind == "missing" and isinstance(keys[-1], int):
        path = path.rpartition(".")[0]
        return UserError("has too few values", field=path, fix=f"set {path} to a list of {keys[-1] + 1} or more values")
    if kind == "missing":
        fix = f"add {path} to the recipe, or {path}=... to the command" if root is Recipe else f"add {path} to the file"
        return UserError(f"is required{_meaning(keys, raw, root)}", field=path, fix=fix)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _wrong_task(path, detail)
    if kind == "value_error":
        return UserError(str(detail["ctx"]["error"]).removeprefix(f"{path}: "), field=path or None)
    if kind == "string_pattern_mismatch":
        return UserError("is not a plain name", field=path, fix="rename it with letters, digits, _ and -")
    expected = expected_words(detail)
    return UserError(
        f"{given_words(detail['input'])}, expected {expected}", field=path, fix=f"set {path} to {expected}"
    )


def _wrong_task(path: str, detail: Any) -> UserError:
    tasks = ", ".join(typing.get_args(model.model_fields["task"].annotation)[0] for model in typing.get_args(AnySource))
    tag = detail.get("ctx", {}).get("tag")
    problem = "names no task" if tag is None else f"there is no task {tag!r}"
    return UserError(problem, field=f"{path}.task", fix=f"set {path}.task to one of: {tasks}")


def expected_words(detail: Any) -> str:
    """What belongs in the place of a wrong value, in words."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("enum", "literal_error"):
        return "one of: " + str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"a number {words} {context[name]}"
    if kind in ("too_long", "too_short"):
        return f"a list of {context.get('max_length', context.get('min_length'))} values"
    return _EXPECTED.get(kind, detail["msg"].removeprefix("Input should be "))


def given_words(value: object) -> str:
    """What stands there, in words."""
    if value is None:
        return "is empty"
    if isinstance(value, Mapping):
        return "is a section"
    if isinstance(value, bool):
        return f"is {str(value).lower()}"
    return f"is {value!r}"


def _clean(loc: Sequence[Key], raw: object) -> list[Key]:
    """The path without the union tags that pydantic puts into it."""
    keys: list[Key] = []
    value: object = raw
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if not last and isinstance(value, Mapping) and key not in value and key == value.get("task"):
            continue
        if key != "[key]":
            keys.append(key)
        value = _inner(value, key)
    return keys


def _inner(value: object, key: Key) -> object:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _unknown_key(keys: list[Key], raw: Mapping[str, Any], root: type[BaseModel]) -> UserError:
    path, section, name = ".".join(map(str, keys)), keys[:-1], str(keys[-1])
    model = _model_at(section, raw, root)
    allowed = list(model.model_fields) if model else []
    prefix = "".join(f"{key}." for key in section)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    elsewhere = [] if near else _elsewhere(name, root)
    if near:
        fix = f"did you mean {prefix}{near[0]}?"
    elif elsewhere:
        fix = f"did you mean {elsewhere[0]}?"
    else:
        fix = f"keys of {prefix.rstrip('.') or ('a recipe' if root is Recipe else 'the file')}: {', '.join(allowed)}"
    return UserError("unknown key", field=path, fix=fix)


def _elsewhere(name: str, root: type[BaseModel]) -> list[str]:
    """Full paths of keys of that or nearly that name in any section."""
    paths = dict(_all_keys(root, ""))
    near = difflib.get_close_matches(name, sorted(set(paths.values())), n=1, cutoff=0.8)
    return [path for path, leaf in paths.items() if leaf in near]


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, name
        inner = _models(field.annotation)
        if len(inner) == 1:
            yield from _all_keys(inner[0], f"{prefix}{name}.")


def _meaning(keys: list[Key], raw: Mapping[str, Any], root: type[BaseModel]) -> str:
    field = _field_at(keys, raw, root)
    if field is None or not field.description:
        return ""
    return f" ({field.description.split('.')[0].split(';')[0].strip()})"


def _field_at(keys: list[Key], raw: Mapping[str, Any], root: type[BaseModel]) -> FieldInfo | None:
    model = _model_at(keys[:-1], raw, root)
    return model.model_fields.get(str(keys[-1])) if model else None


def _model_at(keys: Sequence[Key], raw: Mapping[str, Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section type at a dotted path; among several task types the one the raw mapping names."""
    annotation: object = root
    value: object = raw
    for key in keys:
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            model = _chosen(_models(annotation), value)
            field = model.model_fields.get(str(key)) if model else None
            if field is None:
                return None
            annotation = field.annotation
        value = _inner(value, key)
    return _chosen(_models(annotation), value)


def _chosen(candidates: list[type[BaseModel]], value: object) -> type[BaseModel] | None:
    task = value.get("task") if isinstance(value, Mapping) else None
    for candidate in candidates:
        field = candidate.model_fields.get("task")
        if field is not None and task in typing.get_args(field.annotation):
            return candidate
    return candidates[0] if candidates else None


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]
