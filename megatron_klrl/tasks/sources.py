"""From a recipe's source of prompts to its rows, checked, and to the task."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klrl.config.data import (
    AnySource,
    ArithmeticSource,
    CountdownSource,
    EvalSampling,
    Gsm8kSource,
    JsonlSource,
    MathSource,
    MultipleChoiceSource,
    OnBadRow,
    ReasoningGymSource,
    TableSource,
    VerifierSection,
)
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import sources
from megatron_klrl.errors import UserError
from megatron_klrl.tasks.arithmetic import ArithmeticTask
from megatron_klrl.tasks.countdown import CountdownTask
from megatron_klrl.tasks.grading import ChoiceGrader, ExactGrader, FunctionGrader, Grader, MathGrader
from megatron_klrl.tasks.procedural import ProceduralTask, procedural_dataset
from megatron_klrl.tasks.rendering import Framing, render_prompt
from megatron_klrl.tasks.row_task import RowTask
from megatron_klrl.tasks.rows import Row, RowSet, collect
from megatron_klrl.tasks.schemas import SCHEMAS, math
from megatron_klrl.tasks.tables import read_lines, read_table
from megatron_klrl.tasks.task import Task
from megatron_klrl.tasks.verifier_pool import Verifier, VerifierPool, shared_pool
from megatron_klrl.tasks.verifiers import FunctionVerifier, MathVerifier, ReasoningGymVerifier, reward_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RowSource = JsonlSource | MathSource | Gsm8kSource | MultipleChoiceSource


def check_data(recipe: Recipe) -> list[str]:
    """Read every row and look for every verifier, before any engine starts and without torch.

    Returns:
        What is worth saying: how many rows are skipped.

    Raises:
        UserError: a malformed row, too few rows, a package or a function that is not there.
    """
    notes = []
    for field, source in sources(recipe):
        if isinstance(source, ReasoningGymSource):
            procedural_dataset(source.dataset, size=source.size, seed=0, config=source.config, field=field)
        if isinstance(source, CountdownSource):
            _check_solvable(source, field=field)
        if isinstance(source, RowSource):
            _check_verifier(source, field=field)
            found = read_rows(source, field=field)
            _check_enough(source, len(found.rows), field=field)
            notes += _skipped(found, field=field)
    return notes


def read_rows(source: RowSource, *, field: str) -> RowSet:
    """The rows of a source that is a table.

    Raises:
        UserError: it cannot be read, holds a malformed row, or nothing.
    """
    if isinstance(source, TableSource):
        table = read_table(
            source.path, field=field, subsets=source.subsets, split=source.split, revision=source.revision
        )
    else:
        table = read_lines(_path(source), field=f"{field}.path")
    levels = source.levels if isinstance(source, MathSource) else ()
    schema = SCHEMAS[source.task] if not levels else lambda columns: math(columns, levels)
    skip = source.on_bad_row is OnBadRow.SKIP
    return collect(table, schema, origin=source.path, field=field, skip=skip)


def make_task(
    source: AnySource,
    *,
    field: str,
    tokenizer: "PreTrainedTokenizerBase",
    verifier: VerifierSection,
    seed: int,
    shuffle: bool,
    room: int,
) -> Task:
    """The task of a source.

    Args:
        source: of the recipe.
        field: its dotted key, for messages.
        tokenizer: renders prompts and decodes responses.
        verifier: settings of verifier processes.
        seed: of what is generated, and of the order of rows.
        shuffle: whether rows are drawn in a random order; generated prompts have no other.
        room: tokens that a prompt may have.

    Raises:
        UserError: as `check_data`, and for prompts that leave no room for the response.
    """
    if isinstance(source, ArithmeticSource):
        return ArithmeticTask(kind=source.kind, terms=source.terms, seed=seed, tokenizer=tokenizer)
    framing = Framing(system=source.system, instruction=source.instruction)
    if isinstance(source, CountdownSource):
        return CountdownTask(
            numbers=source.numbers,
            largest=source.largest,
            target=source.target,
            framing=framing,
            seed=seed,
            tokenizer=tokenizer,
        )
    if isinstance(source, ReasoningGymSource):
        dataset = procedural_dataset(
            source.dataset, size=source.size, seed=seed % 2**31, config=source.config, field=field
        )
        pool = _pool(ReasoningGymVerifier(source.dataset), verifier)
        return ProceduralTask(dataset, size=source.size, pool=pool, framing=framing, tokenizer=tokenizer)
    found = read_rows(source, field=field)

    def tokens(question: str) -> int:
        return len(render_prompt(tokenizer, question, framing)[1])

    rows, too_long = _fitting(source, found.rows, tokenize=tokens, room=room, field=field)
    grader = _grader(source, verifier)
    notes = [*too_long, *_unreadable(grader, rows, field=field)]
    return RowTask(rows, grader=grader, tokenizer=tokenizer, framing=framing, seed=seed, shuffle=shuffle, notes=notes)


def _path(source: JsonlSource) -> Path:
    return Path(source.path).expanduser()


def _check_verifier(source: RowSource, *, field: str) -> None:
    if isinstance(source, MultipleChoiceSource) or source.reward == "exact":
        return
    if source.reward != "math":
        reward_function(source.reward)
    elif importlib.util.find_spec("math_verify") is None:
        fix = f"pip install 'megatron-klrl[math]', or set {field}.reward=exact"
        raise UserError("needs math-verify, which is not installed", field=f"{field}.reward", fix=fix)


def _check_solvable(source: CountdownSource, *, field: str) -> None:
    """The hardest case is few numbers; a puzzle that is found for them is found for more."""
    low, high = source.target
    if low > source.largest ** source.numbers[0]:
        problem = f"[{low}, {high}] is out of reach of {source.numbers[0]} numbers up to {source.largest}"
        raise UserError(problem, field=f"{field}.target", fix="lower target, or allow more or larger numbers")


def _check_enough(source: RowSource, rows: int, *, field: str) -> None:
    if isinstance(source, EvalSampling) and rows < source.prompts:
        problem = f"is {source.prompts}, but {source.path} holds {rows} prompts"
        raise UserError(problem, field=f"{field}.prompts", fix=f"set {field}.prompts to {rows} or less")


def _skipped(found: RowSet, *, field: str) -> list[str]:
    if not found.skipped:
        return []
    return [f"{field}: {len(found.skipped)} of {found.total} rows are skipped; the first: {found.skipped[0]}"]


def _fitting(
    source: RowSource, rows: Sequence[Row], *, tokenize: Callable[[str], int], room: int, field: str
) -> tuple[list[Row], list[str]]:
    """Rows whose prompts leave room for the response; the others are refused, or skipped if asked."""
    lengths = [tokenize(row.question) for row in rows]
    long = [length for length in lengths if length > room]
    if long and source.on_bad_row is OnBadRow.ERROR:
        number = next(place for place, length in enumerate(lengths, 1) if length > room)
        problem = f"{len(long)} of {len(rows)} prompts are longer than the {room} tokens that responses leave"
        problem += f" (longest {max(long)}; the first is prompt {number}: {rows[number - 1].question[:40]!r})"
        fix = f"lower generation.max_tokens, raise what bounds a sequence, or set {field}.on_bad_row=skip"
        raise UserError(problem, field=field, fix=fix)
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= room]
    if not kept:
        raise UserError(f"no prompt is as short as {room} tokens", field=field, fix="lower generation.max_tokens")
    _check_enough(source, len(kept), field=field)
    said = f"{field}: {len(long)} of {len(rows)} prompts are skipped: longer than {room} tokens"
    return kept, [said] if long else []


def _grader(source: RowSource, settings: VerifierSection) -> Grader:
    if isinstance(source, MultipleChoiceSource):
        return ChoiceGrader()
    if source.reward == "exact":
        return ExactGrader()
    if source.reward == "math":
        return MathGrader(_pool(MathVerifier(), settings))
    return FunctionGrader(_pool(FunctionVerifier(source.reward), settings))


def _pool(verifier: Verifier, settings: VerifierSection) -> VerifierPool:
    return shared_pool(verifier, workers=settings.workers, timeout_s=settings.timeout_s)


def _unreadable(grader: Grader, rows: Sequence[Row], *, field: str) -> list[str]:
    count = grader.unreadable([row.answer for row in rows]) if isinstance(grader, MathGrader) else 0
    said = f"{field}: math-verify cannot read {count} of {len(rows)} answers; they are compared as text"
    return [said] if count else []
