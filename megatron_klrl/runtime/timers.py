"""Wall-clock spans of one step, by name."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timers:
    """Adds up seconds per span until they are taken.

    On CUDA the device is synchronised at the borders of a span, so that a span owns its kernels.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body and add it to ``name``."""
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds per span since the last call, as ``time/<name>_s``."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
