"""The section data of a recipe: where prompts come from."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_klrl.config.fields import NonNegativeNumber, Positive, Section, SetName, Text


class ArithmeticKind(StrEnum):
    """Family of arithmetic prompts."""

    CHAIN = "chain"
    OP = "op"
    REV = "rev"


def _rising(terms: tuple[int, int]) -> tuple[int, int]:
    if terms[0] > terms[1]:
        raise ValueError(f"the range [{terms[0]}, {terms[1]}] is empty; write the smaller number first")
    return terms


Terms = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=64)], Annotated[int, Field(strict=True, ge=1, le=64)]],
    AfterValidator(_rising),
]


class ArithmeticSource(Section):
    """Generated arithmetic prompts with an exact verifier."""

    task: Literal["arithmetic"]
    """Chooses generated arithmetic."""
    kind: ArithmeticKind
    """chain: additions and subtractions; op: maxima and minima; rev: reversal of digits."""
    terms: Terms
    """Fewest and most terms (digits for rev) of a prompt, both included: [lo, hi]."""


class JsonlSource(Section):
    """Prompts from a file, one JSON object {"prompt": ..., "answer": ...} a line."""

    task: Literal["jsonl"]
    """Chooses a file of prompts."""
    path: Text
    """The .jsonl file."""


class EvalSampling(Section):
    """What an evaluation set adds to a source."""

    prompts: Positive
    """Number of prompts."""
    samples: Positive = 1
    """Completions per prompt."""
    temperature: NonNegativeNumber = 1.0
    """Sampling temperature; 0 is greedy."""


class ArithmeticEval(EvalSampling, ArithmeticSource):
    """Evaluation on generated arithmetic."""


class JsonlEval(EvalSampling, JsonlSource):
    """Evaluation on the first prompts of a file."""


Source = Annotated[ArithmeticSource | JsonlSource, Field(discriminator="task")]
EvalSet = Annotated[ArithmeticEval | JsonlEval, Field(discriminator="task")]


class DataSection(Section):
    """Prompts of training and of evaluation."""

    train: Source
    """Training prompts: task arithmetic or jsonl and that task's keys."""
    eval: dict[SetName, EvalSet] = Field(default_factory=dict)
    """Evaluation sets by name; the name is part of the metric eval/<name>/accuracy."""
