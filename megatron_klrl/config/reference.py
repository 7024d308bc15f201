"""The pages of docs/ that are made from recipes' types and from the catalogue. Imports no torch."""

import enum
import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_klrl.config.data import AnySource
from megatron_klrl.config.presets import PRESETS
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.study import StudyFile
from megatron_klrl.kl.catalogue import catalogue

_CONFIG = """# Recipes

Made by `megatron_klrl.config.reference.render_config()`; do not edit. `klrl config show RECIPE` prints a recipe with
all of these resolved, and every key is an override on the command line: `kl.beta=0.3`.
"""
_MIGRATING = """# Coming from another trainer

Made by `megatron_klrl.config.reference.render_migrating()`; do not edit.

What each trainer's KL flags say, as keys of a recipe here, with the audit's verdict on the gradient that they follow in
expectation ([how it is found](kl/audit.md)): against the sequence-level and the token-level KL, on-policy unless the
verdict says more. Flags and formulas are those of the sources read in mid-2026; the trainers go on changing.

`klrl train RECIPE preset=NAME` sets a whole trainer's defaults, advantages and aggregation included
([presets](kl/presets.md)). Two things are different here whatever the flags: beta passes through no aggregation,
normalisation or whitening, and a combination that is biased for the stated objective starts with `kl.allow_biased=true`
only.
"""


def render_config() -> str:
    """docs/reference/config.md: every key with type, default and meaning."""
    parts = [_CONFIG]
    for name, field in Recipe.model_fields.items():
        sections = list(_models(field.annotation))
        if not sections:
            parts.append(
                f"\n## `{name}`\n\n{_type(field)}, default {_default(field)}. {_flat(field.description or '')}\n"
            )
        parts += [f"\n## `{name}`\n\n{_about(section)}{_table(section, name)}" for section in sections]
    parts.append("\n## Tasks\n\nWhat `data.train` and each set under `data.eval` may be, told apart by `task`.\n")
    parts += [
        f"\n### `{_tag(source)}`\n\n{_about(source)}{_table(source, '')}" for source in typing.get_args(AnySource)
    ]
    parts.append(f"\n## Study files\n\n{_about(StudyFile)}{_table(StudyFile, '')}")
    return "".join(parts)


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        rows.append(f"| `{key}` | {_type(field)} | {_default(field)} | {_flat(field.description or '')} |")
    return "\n".join(rows) + "\n"


def _about(model: type[BaseModel]) -> str:
    return _flat((model.__doc__ or "").split("Raises:")[0]) + "\n\n"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def _type(field: FieldInfo) -> str:
    return _type_text(field.annotation)


def _type_text(annotation: object) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if origin is dict:
        return f"section of {_type_text(parts[1])}"
    if origin is tuple:
        return "list"
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is typing.Annotated:
        return _type_text(parts[0])
    if parts:
        return " or ".join(dict.fromkeys(_type_text(part) for part in parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "NoneType": "none"}
    return names.get(getattr(annotation, "__name__", ""), "value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "its defaults"
    value = field.default
    if isinstance(value, enum.Enum):
        return f"`{value.value}`"
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "none"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _tag(source: type[BaseModel]) -> str:
    return str(typing.get_args(source.model_fields["task"].annotation)[0])


def render_migrating() -> str:
    """docs/migrating.md: each trainer's flags, our keys, the catalogue's verdicts."""
    rows: dict[str, list[str]] = {}
    for entry in catalogue():
        placement, estimator, credit, correction = entry.name.split("/")
        keys = f"`kl.placement={placement} kl.estimator={estimator} kl.credit={credit} kl.correction={correction}`"
        verdicts = f"{entry.verdict_sequence.value} | {entry.verdict_token.value}"
        for shipped in entry.shipped:
            row = f"| `{shipped.flag}` | {keys} | {verdicts} | {shipped.note} |"
            rows.setdefault(shipped.library, []).append(row)
    head = "| there | here | sequence-level | token-level | around the formula, there |\n|---|---|---|---|---|"
    parts = [_MIGRATING]
    for library, listed in sorted(rows.items(), key=lambda item: item[0].lower()):
        named = [f"`{preset.name}`" for preset in PRESETS if preset.origin.split()[0] == library]
        presets = f"Presets: {', '.join(named)}.\n\n" if named else ""
        parts.append(f"\n## {library}\n\n{presets}{head}\n" + "\n".join(listed) + "\n")
    return "".join(parts)
