"""Memory of this rank: device memory where CUDA is used, else resident memory of the process."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_KIB_PER_GIB = 2**20
_STATM = Path("/proc/self/statm")


class MemoryMeter:
    """Most memory in each phase, and since the start. Phases do not nest: each resets the device's own peak."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._most = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the memory of the body: its peak on CUDA; on CPU, which resets no peak, what is resident at its end."""
        if torch.cuda.is_initialized():
            self._most = max(self._most, _device_peak())
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            found = _device_peak() if torch.cuda.is_initialized() else _resident()
            self._phases[name] = max(found, self._phases.get(name, 0.0))

    def take(self) -> dict[str, float]:
        """GiB: ``memory/<phase>_gib`` of the phases since the last call, ``memory/peak_gib`` of the whole life."""
        own = _device_peak() if torch.cuda.is_initialized() else _resident_peak()
        self._most = max(self._most, own, *self._phases.values())
        taken = {f"memory/{name}_gib": gib for name, gib in self._phases.items()}
        self._phases.clear()
        return {**taken, "memory/peak_gib": self._most}


def _device_peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def _resident() -> float:
    pages = int(_STATM.read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def _resident_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB  # Linux counts in KiB
