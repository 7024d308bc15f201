"""Wall-clock spans of one step, by name, and the memory of those that are its phases."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_klrl.runtime.memory import MemoryMeter
from megatron_klrl.runtime.place import Places


class Timers:
    """Adds up seconds per span, and notes the memory of phases, until they are taken.

    On CUDA the device is synchronised at the borders of a span, so that a span owns its kernels.

    Attributes:
        places: phases are among them.
    """

    def __init__(self, places: Places | None = None) -> None:
        self.places = places or Places()
        self._seconds: dict[str, float] = defaultdict(float)
        self._memory = MemoryMeter()

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

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A span that also notes the memory of its body, and is named by its failures; phases do not nest."""
        with self.places.within(name), self.span(name), self._memory.phase(name):
            yield

    def take(self) -> dict[str, float]:
        """Since the last call: seconds per span as ``time/<name>_s``, and what ``MemoryMeter.take`` gives."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return {**taken, **self._memory.take()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
