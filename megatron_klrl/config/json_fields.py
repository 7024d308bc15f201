"""Typed reads from a JSON object that a stranger wrote, with errors that name the file and the key."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFields:
    """The object in a JSON file.

    Attributes:
        file: where it was read.
        values: its keys.
    """

    file: Path
    values: Mapping[str, Any]

    def error(self, problem: str, *, fix: str) -> UserError:
        """A user error about this file."""
        return UserError(problem, field=str(self.file), fix=fix)

    def integer(self, key: str, *, default: int | None = None) -> int:
        """A positive whole number; `default` if the key is absent or null.

        Raises:
            UserError: absent without a default, or something else.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} is {value!r}, expected a positive whole number", fix=f"correct {key}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive number; `default` if the key is absent or null.

        Raises:
            UserError: absent without a default, or something else.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(f"{key} is {value!r}, expected a positive number", fix=f"correct {key}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false; `default` if the key is absent or null.

        Raises:
            UserError: something else.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, expected true or false", fix=f"correct {key}")
        return value

    def _value(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(f"lacks {key}", fix=f"add {key}, as save_pretrained writes it")
        return default
