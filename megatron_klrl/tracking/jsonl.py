"""metrics.jsonl (one object a step) and rollouts/ (samples with their token log-probabilities)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object a step; every line is complete on disk before the next step starts."""

    def __init__(self, path: Path, *, keep_before: int) -> None:
        """Open the file.

        Args:
            path: of metrics.jsonl.
            keep_before: lines of this step and later are dropped: a resumed run writes them again.
        """
        kept = [line for line in _lines(path) if json.loads(line)["step"] < keep_before]
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line + "\n" for line in path.read_text().split("\n")[:-1] if line]


def write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write samples of one step, one JSON object each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
