r"""Arithmetic prompts with exact answers, made from a seed: nothing to download, nothing to label.

Three kinds of problem, all over single digits:

* ``chain``: `calc5+4-1` -- a digit, then `terms` signed digits; every running total stays in 0..9.
* ``op``: `calc5^4v1` -- the same with maximum (`^`) and minimum (`v`).
* ``rev``: `rev3142` -- `terms` digits to be written backwards.

A response is right when it *ends* with `\boxed{answer}` and the end-of-sequence token, whatever stands before:
`5+4=9-1=8\boxed{8}<eos>` and `\boxed{8}<eos>` both score 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rendering import render_prompt
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ArithmeticKind(StrEnum):
    """Which problems a task draws."""

    CHAIN = "chain"
    EXTREMUM = "op"
    REVERSAL = "rev"


OPERATORS = {ArithmeticKind.CHAIN: "+-", ArithmeticKind.EXTREMUM: "^v"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem: `digits`, joined by `operators` (one fewer than the digits; empty for a reversal)."""

    kind: ArithmeticKind
    digits: tuple[int, ...]
    operators: str

    @property
    def question(self) -> str:
        """The text of the user's message."""
        if self.kind is ArithmeticKind.REVERSAL:
            return "rev" + "".join(map(str, self.digits))
        rest = "".join(f"{operator}{digit}" for operator, digit in zip(self.operators, self.digits[1:], strict=True))
        return f"calc{self.digits[0]}{rest}"

    @property
    def answer(self) -> str:
        """What must stand in the box."""
        if self.kind is ArithmeticKind.REVERSAL:
            return "".join(map(str, reversed(self.digits)))
        total = self.digits[0]
        for operator, digit in zip(self.operators, self.digits[1:], strict=True):
            total = apply_operator(operator, total, digit)
        return str(total)


def apply_operator(operator: str, total: int, digit: int) -> int:
    """Result of one step, a single digit.

    Sums are taken modulo 10. No drawn problem leaves 0..9; the rule is for worked demonstrations that carry an earlier
    mistake on, so that every state has one defined continuation.

    Raises:
        ValueError: `operator` is none of `+ - ^ v`.
    """
    match operator:
        case "+":
            return (total + digit) % 10
        case "-":
            return (total - digit) % 10
        case "^":
            return max(total, digit)
        case "v":
            return min(total, digit)
        case _:
            raise ValueError(f"unknown operator {operator!r}; one of + - ^ v")


def draw_problem(rng: random.Random, *, kind: ArithmeticKind, terms: int) -> Problem:
    """Draws one problem.

    Running totals of a chain are independent and uniform on 0..9, hence so is the answer: a blind guess is right with
    probability 1/10.

    Args:
        rng: source of randomness; only `random()` is called, the one generator whose stream Python keeps fixed.
        kind: what to draw.
        terms: operations after the first digit; for a reversal the number of digits. At least 1.
    """
    if kind is ArithmeticKind.REVERSAL:
        return Problem(kind=kind, digits=tuple(draw_below(rng, 10) for _ in range(terms)), operators="")
    if kind is ArithmeticKind.EXTREMUM:
        digits = tuple(draw_below(rng, 10) for _ in range(terms + 1))
        operators = "".join(OPERATORS[kind][draw_below(rng, 2)] for _ in range(terms))
        return Problem(kind=kind, digits=digits, operators=operators)
    return _draw_chain(rng, terms)


def _draw_chain(rng: random.Random, terms: int) -> Problem:
    total = draw_below(rng, 10)
    digits, operators = [total], ""
    for _ in range(terms):
        new_total = draw_below(rng, 10)
        sign_of_zero = "+-"[draw_below(rng, 2)]
        operators += sign_of_zero if new_total == total else "+" if new_total > total else "-"
        digits.append(abs(new_total - total))
        total = new_total
    return Problem(kind=ArithmeticKind.CHAIN, digits=tuple(digits), operators=operators)


def draw_below(rng: random.Random, bound: int) -> int:
    """Uniform integer in 0..bound-1."""
    return int(rng.random() * bound)


class ArithmeticTask:
    """Endless, deterministic stream of arithmetic prompts with an exact verifier (implements `tasks.task.Task`).

    Prompt `i` depends on `(kind, terms, seed, i)` alone: not on the batch it is asked for in, nor on earlier prompts.

    Evaluation sets are the same class with another seed. That makes them *independent* of training, not disjoint from
    it: there are 10 * 11**n different chains of n operations (13,310 for n = 3), so a run of a few thousand prompts
    meets some of the evaluation problems while it trains. Nothing avoids that for short problems. Only sets of another
    kind, or whose `terms` do not overlap, share no problem at all.
    """

    notes: Sequence[str] = ()

    def __init__(self, *, kind: str, terms: tuple[int, int], seed: int, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Checks the arguments; generates nothing yet.

        Args:
            kind: `chain`, `op` or `rev`.
            terms: fewest and most terms, both included: operations after the first digit, or digits of a reversal.
            seed: which stream.
            tokenizer: renders the prompts and decodes the responses; must have an end-of-sequence token.

        Raises:
            UserError: unknown kind, `terms` not an increasing pair of positive integers, or no end-of-sequence token.
        """
        if kind not in set(ArithmeticKind):
            raise UserError(
                f"unknown kind {kind!r} of arithmetic", field="kind", fix=f"use {', '.join(ArithmeticKind)}"
            )
        if len(terms) != 2 or not 1 <= terms[0] <= terms[1]:
            problem = f"{list(terms)} is not a range of problem lengths"
            raise UserError(problem, field="terms", fix="write [fewest, most] with 1 <= fewest <= most")
        if tokenizer.eos_token is None:
            fix = "set eos_token in the model folder's tokenizer_config.json"
            raise UserError("the tokenizer has no end-of-sequence token", field="model.path", fix=fix)
        self._kind = ArithmeticKind(kind)
        self._terms = (terms[0], terms[1])
        self._seed = seed
        self._tokenizer = tokenizer

    def problem(self, index: int) -> Problem:
        """Problem `index` of the stream (>= 0)."""
        fewest, most = self._terms
        rng = random.Random(f"{self._kind}/{fewest}-{most}/{self._seed}/{index}")
        return draw_problem(rng, kind=self._kind, terms=fewest + draw_below(rng, most - fewest + 1))

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream."""
        return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        problem = self.problem(index)
        text, token_ids = render_prompt(self._tokenizer, problem.question)
        return Prompt(index=index, token_ids=token_ids, text=text, answer=problem.answer)

    def verify(self, responses: Sequence[Response]) -> Verdicts:
        """1 for each response that ends with the boxed answer and the end-of-sequence token, else 0."""
        return Verdicts(rewards=[float(self.is_right(each.token_ids, each.prompt.answer)) for each in responses])

    def is_right(self, token_ids: Sequence[int], answer: str) -> bool:
        """Whether a completion ends with this answer in a box and the end-of-sequence token."""
        if not token_ids or token_ids[-1] != self._tokenizer.eos_token_id:
            return False
        text: Any = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text.endswith(f"\\boxed{{{answer}}}{self._tokenizer.eos_token}")
