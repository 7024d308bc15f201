"""Small data sets on disk, as the hub's look."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MATH = [
    {"problem": "One half?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Two?", "level": "Level 5", "type": "Algebra", "solution": "First \\boxed{1}, then $\\boxed 2$."},
    {"problem": "Three?", "level": "Level ?", "type": "Algebra", "solution": "\\fbox{3}"},
]
MATH500 = [{"problem": "Four?", "solution": "\\boxed{5}", "answer": "4", "subject": "Algebra", "level": 2}]
GSM8K = [{"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 1,072"}]
MMLU = [
    {"question": "Which?", "subject": "college_physics", "choices": ["p", "q", "r", "s"], "answer": 2},
    {"question": "Who?", "subject": "college_physics", "choices": ["p", "q", "r", "s"], "answer": 0},
]


def write_jsonl(file: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
    return file
