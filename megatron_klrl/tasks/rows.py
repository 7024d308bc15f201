"""Questions with answers out of tables: what happens to a row that is not as it should be."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_klrl.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its right answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Numbered:
    """A row before it is understood.

    Attributes:
        place: where it stands, in words that lead a person there: `row 3 of data/train.jsonl`.
        content: its columns, or one line of JSON.
    """

    place: str
    content: Mapping[str, object] | str


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of a source.

    Attributes:
        rows: that a task draws from.
        total: rows there are, those left out included.
        skipped: why rows were skipped, a sentence for each.
    """

    rows: tuple[Row, ...]
    total: int
    skipped: tuple[str, ...]


class BadRowError(ValueError):
    """A row is not what its schema wants.

    Args:
        problem: continues "row 3 of FILE".
        fix: what to write there.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


Schema = Callable[[Mapping[str, object]], Row | None]
"""From a row's columns to question and answer; None for a row that was not asked for."""


def collect(table: Iterable[Numbered], schema: Schema, *, origin: str, field: str, skip: bool) -> RowSet:
    """Understand every row.

    Args:
        table: the rows.
        schema: what they should be.
        origin: file, folder or name of the whole.
        field: dotted key of the recipe, for messages.
        skip: leave malformed rows out and count them, instead of refusing the whole.

    Raises:
        UserError: a malformed row, or none that is left.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    total = 0
    for total, numbered in enumerate(table, 1):  # noqa: B007 - the last number is the count
        try:
            row = schema(_columns(numbered.content))
        except BadRowError as bad:
            problem = f"{numbered.place} {bad.problem}"
            if not skip:
                raise UserError(problem, field=field, fix=bad.fix) from bad
            skipped.append(problem)
        else:
            rows += [] if row is None else [row]
    if not rows:
        problem = f"{origin} has no rows" if total == 0 else f"none of the {total} rows of {origin} can be used"
        fix = f"; the first: {skipped[0]}" if skipped else ""
        raise UserError(problem + fix, field=field, fix="write one question a row, with its answer")
    return RowSet(rows=tuple(rows), total=total, skipped=tuple(skipped))


def _columns(content: Mapping[str, object] | str) -> Mapping[str, object]:
    if not isinstance(content, str):
        return content
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg}, column {error.colno})"
        raise BadRowError(problem, fix="write one object a line") from error
    if not isinstance(row, dict):
        raise BadRowError(f"is {json.dumps(row)[:40]}, not an object", fix='write an object like {"key": "value"}')
    return row
