"""Rows of files, folders and hub data sets. The only importer of Hugging Face `datasets`.

A .jsonl file is read line by line here: a reader of columns cannot say which line is wrong, and refuses columns whose
type changes from line to line.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_klrl.config.data import is_hub_name
from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rows import Numbered


def read_table(
    path: str, *, field: str, subsets: Sequence[str] = (), split: str, revision: str | None
) -> Iterator[Numbered]:
    """The rows of a source, one after the other.

    Args:
        path: a .jsonl or .parquet file, a folder in the hub's layout, or a name on the hub (`openai/gsm8k`).
        field: dotted key of the recipe, for messages.
        subsets: configurations of a folder or a hub name, read one after the other; none: its only one.
        split: of a folder or a hub name.
        revision: commit or tag of a hub name.

    Raises:
        UserError: it cannot be read.
    """
    file = Path(path).expanduser()
    if file.suffix == ".jsonl" and not file.is_dir():
        yield from read_lines(file, field=f"{field}.path")
        return
    for subset in subsets or (None,):
        named = ", ".join([*([subset] if subset else []), f"split {split}"])
        origin = path if file.is_file() else f"{path} ({named})"
        for number, columns in enumerate(_load(path, field=field, subset=subset, split=split, revision=revision), 1):
            yield Numbered(f"row {number} of {origin}", columns)


def read_lines(file: Path, *, field: str) -> Iterator[Numbered]:
    """Lines of a jsonl file that are not blank, counted from 1 with those that are.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"prompt file {file} {what}", field=field, fix="give the path of a jsonl file")
    try:
        # utf-8-sig: editors on Windows put a byte-order mark first, which JSON does not allow.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        problem = f"prompt file {file} is not UTF-8 (byte {error.start})"
        raise UserError(problem, field=field, fix="save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Numbered(f"row {number} of {file}", line)


def _load(
    path: str, *, field: str, subset: str | None, split: str, revision: str | None
) -> Iterator[dict[str, object]]:
    import datasets  # noqa: PLC0415 - seconds of import, for recipes that name such a source

    file = Path(path).expanduser()
    datasets.disable_progress_bars()
    try:
        if file.is_file():
            table = datasets.load_dataset("parquet", data_files={"train": str(file)}, split="train")
        else:
            name = path if is_hub_name(path) and not file.exists() else str(file)
            table = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"datasets cannot read {path}: {_first_line(error)}"
        fix = "check path, subsets and split; a hub name needs a network, or a local copy in the hub's layout"
        raise UserError(problem, field=f"{field}.path", fix=fix) from error
    rows: Any = table  # annotated with every format that a row could have been asked for in
    yield from rows


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
