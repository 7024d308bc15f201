"""What is known of prompts before a tokenizer is loaded: lengths of generated ones, rows of files."""

from pathlib import Path

from megatron_klrl.config.data import AnySource, ArithmeticKind, ArithmeticSource
from megatron_klrl.errors import UserError

# <|im_start|>, the word that names the kind, <|im_end|>; one token each with the embedded tokenizer, more with others.
_FRAME_TOKENS = 3
_BOX_AND_EOS_TOKENS = 3


def longest_prompt(source: AnySource) -> int:
    """Tokens of the longest prompt, as far as known without a tokenizer: a lower bound.

    Exact for arithmetic with the embedded tokenizer. Otherwise it is 1: rows are measured once a tokenizer is there.
    """
    if not isinstance(source, ArithmeticSource):
        return 1
    terms = source.terms[1]
    digits_and_operators = terms if source.kind is ArithmeticKind.REV else 2 * terms + 1
    return _FRAME_TOKENS + digits_and_operators


def longest_worked_answer(source: ArithmeticSource) -> int:
    """Tokens of the longest answer that shows each step, with the embedded tokenizer, end-of-sequence included."""
    terms = source.terms[1]
    if source.kind is ArithmeticKind.REV:
        return terms + _BOX_AND_EOS_TOKENS
    # "5+4=9-1=8": the first digit, then operator, digit, =, result for each term; then \boxed{, 8, }, <eos>.
    return 1 + 4 * terms + 1 + _BOX_AND_EOS_TOKENS


def count_rows(path: str, *, field: str) -> int:
    """Rows of a prompt file that are not blank; the task that reads them checks what they hold.

    Raises:
        UserError: no such file, or nothing in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        problem = f"there is no file {path}" if not file.exists() else f"{path} is a folder, not a file"
        raise UserError(problem, field=field, fix="give a .jsonl file; paths start from the current directory")
    with file.open("rb") as lines:
        rows = sum(1 for line in lines if line.strip())
    if rows == 0:
        problem = f"{path} is empty"
        raise UserError(problem, field=field, fix='write one {"prompt": "...", "answer": "..."} object a line')
    return rows
