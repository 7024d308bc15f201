"""Questions from a table as an endless stream."""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_klrl.tasks.grading import Attempt, Grader
from megatron_klrl.tasks.rendering import Framing, render_prompt
from megatron_klrl.tasks.rows import Row
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowTask:
    """Endless, deterministic stream over rows (implements `tasks.task.Task`).

    The stream is epoch after epoch: prompt `i` belongs to epoch `i // len(task)`, and every row appears once in an
    epoch. Shuffled, the order of an epoch depends on `(seed, epoch)` alone; otherwise it is the order of the table,
    which is what an evaluation set wants: `task.prompts(0, len(task))` is the whole table once.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        grader: Grader,
        tokenizer: "PreTrainedTokenizerBase",
        framing: Framing,
        seed: int,
        shuffle: bool,
        notes: Sequence[str] = (),
    ) -> None:
        """Take the rows.

        Args:
            rows: at least one.
            grader: of the responses.
            tokenizer: renders the prompts and decodes the responses.
            framing: what stands around each question.
            seed: of the shuffle; without `shuffle` it has no effect.
            shuffle: whether each epoch has its own order.
            notes: for the user.
        """
        self._rows, self._grader, self.notes = rows, grader, tuple(notes)
        self._tokenizer, self._framing = tokenizer, framing
        self._seed, self._shuffle = seed, shuffle

    def __len__(self) -> int:
        """Number of rows, the length of an epoch."""
        return len(self._rows)

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream."""
        return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        row = self._row(index)
        text, token_ids = render_prompt(self._tokenizer, row.question, self._framing)
        return Prompt(index=index, token_ids=token_ids, text=text, answer=row.answer)

    def _row(self, index: int) -> Row:
        epoch, position = divmod(index, len(self._rows))
        return self._rows[_epoch_order(self._seed, epoch, len(self._rows))[position] if self._shuffle else position]

    def verify(self, responses: Sequence[Response]) -> Verdicts:
        """What the grader says of each response's text. Being cut off by the length limit does not matter as such."""
        return self._grader.grade(
            [
                Attempt(
                    question=self._row(response.prompt.index).question,
                    response=decode(self._tokenizer, response.token_ids),
                    answer=response.prompt.answer,
                )
                for response in responses
            ]
        )


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """A response as text, without special tokens."""
    text: Any = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    # Sorting by random() and not shuffle(): Python keeps only the stream of random() fixed across its versions.
    rng = random.Random(f"epoch order/{seed}/{epoch}")
    keys = [rng.random() for _ in range(size)]
    return tuple(sorted(range(size), key=keys.__getitem__))
