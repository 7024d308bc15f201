"""Prompts from a user's jsonl file, verified by the boxed answer.

One JSON object a line, with two strings: `{"prompt": "What is 2+3?", "answer": "5"}`. Further keys are ignored.
"""

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rendering import last_boxed, render_prompt
from megatron_klrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLE = '{"prompt": "What is 2+3?", "answer": "5"}'
_KEYS = ("prompt", "answer")


class JsonlTask:
    r"""Endless, deterministic stream over the rows of one file (implements `tasks.task.Task`).

    The stream is epoch after epoch: prompt `i` belongs to epoch `i // len(task)`, and every row appears once in an
    epoch. Shuffled, the order of an epoch depends on `(seed, epoch)` alone; otherwise it is the order of the file,
    which is what an evaluation set wants: `task.prompts(0, len(task))` is the whole file once.

    A response is right when the content of its last balanced `\boxed{}` equals the row's answer character by character,
    surrounding white space aside: `1/2` and `0.5` are different answers.
    """

    def __init__(self, *, path: str | Path, tokenizer: "PreTrainedTokenizerBase", seed: int, shuffle: bool) -> None:
        """Reads and checks the whole file.

        Args:
            path: the jsonl file.
            tokenizer: renders the prompts, through its chat template when it has one, and decodes the responses.
            seed: of the shuffle; without `shuffle` it has no effect.
            shuffle: whether each epoch has its own order.

        Raises:
            UserError: no such file, nothing in it, or a row that is not what the module describes.
        """
        self._rows = read_rows(Path(path))
        self._tokenizer = tokenizer
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Number of rows, the length of an epoch."""
        return len(self._rows)

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream."""
        return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        epoch, position = divmod(index, len(self._rows))
        row = _epoch_order(self._seed, epoch, len(self._rows))[position] if self._shuffle else position
        question, answer = self._rows[row]
        text, token_ids = render_prompt(self._tokenizer, question)
        return Prompt(index=index, token_ids=token_ids, text=text, answer=answer)

    def verify(self, prompt: Prompt, completion_ids: Sequence[int], finish_reason: str) -> float:
        """1.0 if the last balanced box holds the answer, else 0.0.

        Args:
            prompt: the prompt that was answered.
            completion_ids: what the policy wrote.
            finish_reason: has no influence: a box that was closed before generation was cut off counts.
        """
        del finish_reason
        text: Any = self._tokenizer.decode(list(completion_ids), skip_special_tokens=True)
        boxed = last_boxed(text)
        return float(boxed is not None and boxed.strip() == prompt.answer)


def read_rows(path: Path) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) of every row; blank lines are skipped, the answer is stripped.

    Raises:
        UserError: names the file, the line (counted from 1) and what to write there.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"prompt file {path} {what}", field="data", fix="give the path of a jsonl file")
    try:
        # utf-8-sig: editors on Windows put a byte-order mark first, which JSON does not allow.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {path} is not UTF-8 (byte {error.start})", field="data", fix="save it as UTF-8"
        ) from error
    rows = tuple(_parse_row(line, path=path, number=number) for number, line in enumerate(lines, 1) if line.strip())
    if not rows:
        raise UserError(f"prompt file {path} has no rows", field="data", fix=f"write one object a line: {_EXAMPLE}")
    return rows


def _parse_row(line: str, *, path: Path, number: int) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        _reject(path, number, f"is not JSON ({error.msg}, column {error.colno})", f"write an object like {_EXAMPLE}")
    if not isinstance(row, dict):
        _reject(path, number, f"is {json.dumps(row)[:40]}, not an object", f"write an object like {_EXAMPLE}")
    for key in _KEYS:
        _check_value(row, key, path=path, number=number)
    return row["prompt"], row["answer"].strip()


def _check_value(row: dict[str, object], key: str, *, path: Path, number: int) -> None:
    if key not in row:
        _reject(path, number, f"has no key {key!r}", f"add it, as in {_EXAMPLE}; found: {', '.join(row) or 'nothing'}")
    value = row[key]
    if not isinstance(value, str):
        shown = json.dumps(value)[:40]
        _reject(path, number, f"has {key!r} = {shown}, not a string", f"put it in quotes, as in {_EXAMPLE}")
    if not value.strip():
        _reject(path, number, f"has an empty {key!r}", "fill it in or delete the row")


def _reject(path: Path, number: int, problem: str, fix: str) -> NoReturn:
    raise UserError(f"row {number} of {path} {problem}", field="data", fix=fix)


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    # Sorting by random() and not shuffle(): Python keeps only the stream of random() fixed across its versions.
    rng = random.Random(f"epoch order/{seed}/{epoch}")
    keys = [rng.random() for _ in range(size)]
    return tuple(sorted(range(size), key=keys.__getitem__))
