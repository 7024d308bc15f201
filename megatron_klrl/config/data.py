"""The section data of a recipe: where prompts come from."""

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from megatron_klrl.config.fields import Flag, NonNegativeNumber, Positive, PositiveNumber, Section, SetName, Text

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
TABLE_SUFFIXES = (".jsonl", ".parquet")


class ArithmeticKind(StrEnum):
    """Family of arithmetic prompts."""

    CHAIN = "chain"
    OP = "op"
    REV = "rev"


class OnBadRow(StrEnum):
    """What happens to a row that cannot be understood."""

    ERROR = "error"
    SKIP = "skip"


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist here may name a data set on the hub: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None and not path.endswith(TABLE_SUFFIXES)


def _rising(terms: tuple[int, int]) -> tuple[int, int]:
    if terms[0] > terms[1]:
        raise ValueError(f"the range [{terms[0]}, {terms[1]}] is empty; write the smaller number first")
    return terms


def _reward(text: str) -> str:
    if text in ("exact", "math") or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        return text
    raise ValueError(f"{text!r} is no reward; write exact, math, or module:function for your own")


Terms = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=64)], Annotated[int, Field(strict=True, ge=1, le=64)]],
    AfterValidator(_rising),
]
Numbers = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=2, le=8)], Annotated[int, Field(strict=True, ge=2, le=8)]],
    AfterValidator(_rising),
]
Targets = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
Reward = Annotated[Text, AfterValidator(_reward)]


class ArithmeticSource(Section):
    """Generated arithmetic prompts with an exact verifier."""

    task: Literal["arithmetic"]
    """Chooses generated arithmetic."""
    kind: ArithmeticKind
    """chain: additions and subtractions; op: maxima and minima; rev: reversal of digits."""
    terms: Terms
    """Fewest and most terms (digits for rev) of a prompt, both included: [lo, hi]."""


class Framed(Section):
    """What stands around a question."""

    system: Text | None = None
    """System message; none leaves it to the model's chat template, which may have one of its own."""
    instruction: Text | None = STEP_BY_STEP
    """Follows the question in the user's message, after an empty line; none: nothing does. The verifiers read the last
    \\boxed{} of a response, so something has to ask for it."""


class JsonlSource(Framed):
    """Prompts from a file, one JSON object {"prompt": ..., "answer": ...} a line."""

    task: Literal["jsonl"]
    """Chooses a file of prompts."""
    path: Text
    """The .jsonl file."""
    instruction: Text | None = None
    """Follows the prompt in the user's message, after an empty line; none: nothing does."""
    reward: Reward = "exact"
    """exact: the last \\boxed{} holds the answer character by character; math: it equals the answer, by math-verify;
    module:function: what your function(question, response, answer) returns."""
    on_bad_row: OnBadRow = OnBadRow.ERROR
    """error refuses a file with a malformed row; skip leaves such rows out, and says how many."""


class TableSource(Framed):
    """A data set that Hugging Face datasets reads."""

    path: Text
    """A .parquet or .jsonl file, a folder in the hub's layout, or a name on the hub (owner/name)."""
    subsets: tuple[Text, ...] = ()
    """Configurations of a folder or a hub name, one after the other; []: its only one."""
    split: Text = "train"
    """Split of a folder or a hub name; a file is one split, train."""
    revision: Text | None = None
    """Commit or tag of a hub name; none: the newest."""
    on_bad_row: OnBadRow = OnBadRow.ERROR
    """error refuses a data set with a malformed row; skip leaves such rows out, and says how many."""


class MathSource(TableSource):
    """Competition mathematics: columns problem, and answer or a solution with a box; level."""

    task: Literal["math"]
    """Chooses columns as in MATH and MATH-500."""
    reward: Reward = "math"
    """math: the last \\boxed{} equals the answer, by math-verify; exact; or module:function, as for jsonl."""
    levels: tuple[Positive, ...] = ()
    """Levels to draw from; []: all."""


class Gsm8kSource(TableSource):
    """School mathematics: columns question, and answer with a last line '#### 72'."""

    task: Literal["gsm8k"]
    """Chooses columns as in GSM8K."""
    reward: Reward = "math"
    """math: the last \\boxed{} equals the answer, by math-verify; exact; or module:function, as for jsonl."""


class MultipleChoiceSource(TableSource):
    """Multiple choice, answered by a letter: columns question, choices, answer."""

    task: Literal["multiple_choice"]
    """Chooses columns as in MMLU."""


class CountdownSource(Framed):
    """Generated: reach a target from numbers with + - * /, each number at most once."""

    task: Literal["countdown"]
    """Chooses countdown."""
    numbers: Numbers = (3, 4)
    """Fewest and most numbers of a puzzle, both included."""
    largest: Positive = 99
    """Numbers are 1 to this."""
    target: Targets = (10, 100)
    """Smallest and largest target, both included."""


class ReasoningGymSource(Framed):
    """Generated by one of reasoning-gym's data sets, and verified by its scorer; needs the extra [tasks]."""

    task: Literal["reasoning_gym"]
    """Chooses reasoning-gym."""
    dataset: Text
    """Name of the data set, for example chain_sum."""
    size: Positive = 100_000
    """Entries; after the last comes the first again."""
    config: dict[Text, Any] = Field(default_factory=dict)
    """Settings of that data set, for example {min_terms: 3, max_terms: 5}."""


class VerifierSection(Section):
    """Processes in which math-verify, reasoning-gym's scorers and your own functions run."""

    workers: Positive = 2
    """Processes of each rank; a step's responses are shared out over the ranks first."""
    timeout_s: PositiveNumber = 5.0
    """Longest time for one response, in seconds; after it the reward is 0 and reward/verifier_timeouts counts it."""


class EvalSampling(Section):
    """What an evaluation set adds to a source."""

    prompts: Positive
    """Number of prompts."""
    samples: Positive = 1
    """Completions per prompt; klrl eval reports pass@k for the powers of two up to it."""
    temperature: NonNegativeNumber = 1.0
    """Sampling temperature; 0 is greedy."""
    out_of_distribution: Flag = False
    """The set is of another kind than the training prompts: reports say so."""


class ArithmeticEval(EvalSampling, ArithmeticSource):
    """Evaluation on generated arithmetic."""


class JsonlEval(EvalSampling, JsonlSource):
    """Evaluation on the first prompts of a file."""


class MathEval(EvalSampling, MathSource):
    """Evaluation on the first prompts of a data set."""


class Gsm8kEval(EvalSampling, Gsm8kSource):
    """Evaluation on the first prompts of a data set."""


class MultipleChoiceEval(EvalSampling, MultipleChoiceSource):
    """Evaluation on the first prompts of a data set."""


class CountdownEval(EvalSampling, CountdownSource):
    """Evaluation on generated puzzles."""


class ReasoningGymEval(EvalSampling, ReasoningGymSource):
    """Evaluation on generated entries."""


AnySource = (
    ArithmeticSource
    | JsonlSource
    | MathSource
    | Gsm8kSource
    | MultipleChoiceSource
    | CountdownSource
    | ReasoningGymSource
)
Source = Annotated[AnySource, Field(discriminator="task")]
EvalSet = Annotated[
    ArithmeticEval | JsonlEval | MathEval | Gsm8kEval | MultipleChoiceEval | CountdownEval | ReasoningGymEval,
    Field(discriminator="task"),
]


class DataSection(Section):
    """Prompts of training and of evaluation."""

    train: Source
    """Training prompts: task (arithmetic, jsonl, math, gsm8k, multiple_choice, countdown or reasoning_gym) and that
    task's keys."""
    eval: dict[SetName, EvalSet] = Field(default_factory=dict)
    """Evaluation sets by name; the name is part of the metric eval/<name>/accuracy."""
    verifier: VerifierSection = Field(default_factory=VerifierSection)
    """Processes of verifiers."""
