r"""Countdown: reach a target from given numbers with + - * / and parentheses, each number at most once.

Generated from a seed and always solvable; nothing to download. The game as a task for
reinforcement learning is from TinyZero (Pan 2025); generation and verification are our own.
"""

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.arithmetic import draw_below
from megatron_klrl.tasks.rendering import Framing, last_boxed, render_prompt
from megatron_klrl.tasks.row_task import decode
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIES = 10_000
_LONGEST = 200  # characters of an expression: six numbers and five operators need far less
_PLAIN = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "", "×": "*", "÷": "/", "−": "-"}  # noqa: RUF001
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Numbers and the target that some expression over all of them reaches."""

    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        """The text of the user's message."""
        return (
            f"Using the numbers {', '.join(map(str, self.numbers))}, write an expression that equals {self.target}. "
            "Use + - * / and parentheses, and each number at most once."
        )


def draw_puzzle(rng: random.Random, *, count: int, largest: int, target: tuple[int, int]) -> Puzzle | None:
    """Draws numbers and combines them at random, with whole results, to one; None if that misses the target's range.

    Args:
        rng: only `random()` is called.
        count: of numbers.
        largest: each is 1..largest.
        target: smallest and largest, both included.
    """
    numbers = tuple(1 + draw_below(rng, largest) for _ in range(count))
    values = list(numbers)
    while len(values) > 1:
        left = values.pop(draw_below(rng, len(values)))
        right = values.pop(draw_below(rng, len(values)))
        whole = [left + right, left - right, left * right]
        whole += [left // right] if right != 0 and left % right == 0 else []
        values.append(whole[draw_below(rng, len(whole))])
    return Puzzle(numbers, values[0]) if target[0] <= values[0] <= target[1] else None


def solves(expression: str, puzzle: Puzzle) -> bool:
    """Whether an expression reaches the target with the numbers, each used at most as often as it is there.

    It is parsed, never run: whole numbers, `+ - * /`, parentheses, and their LaTeX forms `\\times`, `\\cdot`, `\\div`.
    Values are exact fractions. A sign before a number, a power, or an equation is not an expression of the game.
    """
    plain = expression.strip()
    for typeset, character in _PLAIN.items():
        plain = plain.replace(typeset, character)
    if len(plain) > _LONGEST or not set(plain) <= set("0123456789+-*/() "):
        return False
    try:
        body = ast.parse(plain.strip(), mode="eval").body
        used = Counter(node.value for node in ast.walk(body) if isinstance(node, ast.Constant))
        return used <= Counter(puzzle.numbers) and _value(body) == puzzle.target
    except (SyntaxError, ZeroDivisionError, ValueError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is not part of the game")


class CountdownTask:
    """Endless, deterministic stream of puzzles (implements `tasks.task.Task`); prompt `i` depends on seed and `i`."""

    notes: Sequence[str] = ()

    def __init__(
        self,
        *,
        numbers: tuple[int, int],
        largest: int,
        target: tuple[int, int],
        framing: Framing,
        seed: int,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        """Take the settings.

        Args:
            numbers: fewest and most numbers of a puzzle.
            largest: numbers are 1..largest.
            target: smallest and largest target.
            framing: what stands around the question.
            seed: which stream.
            tokenizer: renders the prompts and decodes the responses.
        """
        self._numbers, self._largest, self._target = numbers, largest, target
        self._framing, self._seed, self._tokenizer = framing, seed, tokenizer

    def puzzle(self, index: int) -> Puzzle:
        """Puzzle `index` of the stream.

        Raises:
            UserError: no puzzle of these settings was found.
        """
        fewest, most = self._numbers
        rng = random.Random(f"countdown/{fewest}-{most}/{self._largest}/{self._target}/{self._seed}/{index}")
        count = fewest + draw_below(rng, most - fewest + 1)
        for _ in range(_TRIES):
            puzzle = draw_puzzle(rng, count=count, largest=self._largest, target=self._target)
            if puzzle is not None:
                return puzzle
        low, high = self._target
        problem = f"no target in [{low}, {high}] was reached from {count} numbers up to {self._largest}"
        raise UserError(problem, field="target", fix="widen target, or allow more or larger numbers")

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream."""
        return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        puzzle = self.puzzle(index)
        text, token_ids = render_prompt(self._tokenizer, puzzle.question, self._framing)
        return Prompt(index=index, token_ids=token_ids, text=text, answer=str(puzzle.target))

    def verify(self, responses: Sequence[Response]) -> Verdicts:
        """1 if the last balanced box solves the puzzle, else 0."""
        boxed = [last_boxed(decode(self._tokenizer, response.token_ids)) for response in responses]
        return Verdicts(
            rewards=[
                float(box is not None and solves(box, self.puzzle(response.prompt.index)))
                for box, response in zip(boxed, responses, strict=True)
            ]
        )
