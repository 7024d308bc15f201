"""The columns of the data sets that are understood, one function each: from a row's columns to question and answer."""

import json
import re
import string
from collections.abc import Callable, Collection, Mapping

from megatron_klrl.tasks.rendering import last_boxed
from megatron_klrl.tasks.rows import BadRowError, Row

Columns = Mapping[str, object]

_LETTERS = string.ascii_uppercase


def question_and_answer(columns: Columns) -> Row:
    """`prompt` and `answer`, both text."""
    return Row(_text(columns, "prompt"), _text(columns, "answer").strip())


def math(columns: Columns, levels: Collection[int] = ()) -> Row | None:
    r"""`problem` with `answer` (MATH-500), or with a `solution` whose last box is the answer (MATH).

    Args:
        columns: of the row.
        levels: the levels that are wanted; none: all. `level` is a number or text with one ("Level 5"); "Level ?" is
            no level.
    """
    if levels and _level(columns) not in levels:
        return None
    question = _text(columns, "problem")
    if columns.get("answer") is not None:
        return Row(question, _text(columns, "answer").strip())
    boxed = last_boxed(_with_braces(_text(columns, "solution")))
    if not (boxed or "").strip():
        problem = "has a 'solution' without a boxed answer, and no 'answer'"
        raise BadRowError(problem, fix=r"put the answer into \boxed{}, or add it as 'answer'")
    return Row(question, (boxed or "").strip())


def gsm8k(columns: Columns) -> Row:
    """`question` and an `answer` whose last line is `#### 72`; commas of thousands are dropped."""
    _, marker, answer = _text(columns, "answer").rpartition("####")
    if not marker or not answer.strip():
        raise BadRowError("has an 'answer' without '#### result'", fix="end it with a line '#### 72'")
    return Row(_text(columns, "question"), answer.strip().replace(",", ""))


def multiple_choice(columns: Columns) -> Row:
    """`question`, `choices` (list of texts) and `answer`: the right one's position from 0, or its letter (MMLU)."""
    choices, answer = columns.get("choices"), columns.get("answer")
    fix = 'write "choices": ["...", "..."] and "answer": position of the right one from 0, or its letter'
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(_LETTERS):
        raise BadRowError("has no list 'choices' of 2 to 26 texts", fix=fix)
    if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        raise BadRowError("has a choice that is not a text", fix=fix)
    letters = _LETTERS[: len(choices)]
    if isinstance(answer, str) and answer.strip().upper() in set(letters):
        right = answer.strip().upper()
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        right = letters[answer]
    else:
        raise BadRowError(f"has 'answer' = {_shown(answer)}, which is none of its {len(choices)} choices", fix=fix)
    listed = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in zip(letters, choices, strict=True))
    return Row(f"{_text(columns, 'question').strip()}\n\n{listed}", right)


SCHEMAS: Mapping[str, Callable[[Columns], Row | None]] = {
    "jsonl": question_and_answer,
    "math": math,
    "gsm8k": gsm8k,
    "multiple_choice": multiple_choice,
}


def _level(columns: Columns) -> int | None:
    if columns.get("level") is None:
        raise BadRowError("has no 'level', but levels are asked for", fix="add it, or leave levels out")
    digits = re.search(r"\d+", str(columns["level"]))
    return int(digits[0]) if digits else None


def _with_braces(solution: str) -> str:
    r"""MATH also has `\fbox{5}` and `\boxed 5`."""
    return re.sub(r"\\boxed\s+([^\s{}$]+)", r"\\boxed{\1}", solution.replace("\\fbox", "\\boxed"))


def _text(columns: Columns, key: str) -> str:
    if key not in columns:
        found = ", ".join(columns) or "nothing"
        raise BadRowError(f"has no key {key!r}", fix=f"add it as text; found: {found}")
    value = columns[key]
    if not isinstance(value, str):
        raise BadRowError(f"has {key!r} = {_shown(value)}, not a string", fix=f"put it in quotes: {key} is text")
    if not value.strip():
        raise BadRowError(f"has an empty {key!r}", fix="fill it in or delete the row")
    return value


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:40]
