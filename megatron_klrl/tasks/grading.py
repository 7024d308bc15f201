"""From a response's text to its reward, for questions with one right answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_klrl.tasks.rendering import last_boxed
from megatron_klrl.tasks.task import Verdicts
from megatron_klrl.tasks.verifier_pool import VerifierPool

# What is typeset differently and means the same; taken away on both sides before texts are compared.
_TYPESETTING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\$")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # between digits or letters it has a meaning: 2 1/2 is not 21/2
_FRACTION = re.compile(r"\\[dt]frac")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf))?[{(]*([A-Za-z])[})]*\.?")


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response as text.

    Attributes:
        question: as it stands in the data.
        response: what the policy wrote, without special tokens.
        answer: the right one.
    """

    question: str
    response: str
    answer: str


class Grader(Protocol):
    """Gives rewards to attempts."""

    def grade(self, attempts: Sequence[Attempt]) -> Verdicts:
        """One reward for each, in order."""
        ...


class ExactGrader:
    r"""1 if the last balanced `\boxed{}` holds the answer character by character, surrounding white space aside."""

    def grade(self, attempts: Sequence[Attempt]) -> Verdicts:
        """One reward for each, in order."""
        return Verdicts(rewards=[float(_boxed(attempt) == attempt.answer) for attempt in attempts])


class ChoiceGrader:
    r"""1 if the last balanced box holds the letter of the right choice: `B`, `b`, `(B)`, `B.`, `\text{B}`."""

    def grade(self, attempts: Sequence[Attempt]) -> Verdicts:
        """One reward for each, in order."""
        letters = [_CHOICE.fullmatch(_boxed(attempt) or "") for attempt in attempts]
        return Verdicts(
            rewards=[
                float(letter is not None and letter[1].upper() == attempt.answer)
                for letter, attempt in zip(letters, attempts, strict=True)
            ]
        )


class MathGrader:
    """1 if the last balanced box holds an expression that equals the answer.

    Texts that agree up to typesetting need no algebra, and a response without a box is wrong; the rest goes to
    math-verify. It reads one box, the last, for several would become a set. An answer that it cannot read is
    compared as text.
    """

    def __init__(self, pool: VerifierPool) -> None:
        """Take the pool, of `verifiers.MathVerifier`."""
        self._pool = pool

    def grade(self, attempts: Sequence[Attempt]) -> Verdicts:
        """One reward for each, in order."""
        boxed = [_boxed(attempt) for attempt in attempts]
        rewards = [
            float(box is not None and normalise(box) == normalise(attempt.answer))
            for box, attempt in zip(boxed, attempts, strict=True)
        ]
        open_cases = [place for place, box in enumerate(boxed) if box and not rewards[place]]
        found = self._pool.score([(attempts[place].answer, boxed[place]) for place in open_cases])
        for place, reward in zip(open_cases, found.rewards, strict=True):
            rewards[place] = reward
        return Verdicts(rewards=rewards, timeouts=found.timeouts, errors=found.errors)

    def unreadable(self, answers: Sequence[str]) -> int:
        """How many right answers math-verify cannot read; plain numbers it can."""
        doubtful = [answer for answer in answers if not re.fullmatch(r"-?\d+(\.\d+)?", answer)]
        return int(len(doubtful) - sum(self._pool.score([(answer, None) for answer in doubtful]).rewards))


class FunctionGrader:
    """The reward that a user's function gives."""

    def __init__(self, pool: VerifierPool) -> None:
        """Take the pool, of a `verifiers.FunctionVerifier`."""
        self._pool = pool

    def grade(self, attempts: Sequence[Attempt]) -> Verdicts:
        """One reward for each, in order."""
        return self._pool.score([(attempt.question, attempt.response, attempt.answer) for attempt in attempts])


def normalise(text: str) -> str:
    r"""An answer without what is typesetting only: spaces, dollars, `\left`, `\dfrac` for `\frac`, `1,000` for 1000."""
    bare = _SPACE.sub("", _FRACTION.sub(r"\\frac", _TYPESETTING.sub("", text))).removesuffix(".")
    return bare.replace(",", "") if _THOUSANDS.fullmatch(bare) else bare


def _boxed(attempt: Attempt) -> str | None:
    found = last_boxed(attempt.response)
    return None if found is None else found.strip()
