"""How much memory a rank's tensors take on the CPU: what is alive at rest, and how far allocations rise above it.

Resident memory would not do: it holds the imports, and the allocator keeps what tensors have given back.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def alive_bytes() -> int:
    """Memory of every tensor there is, each storage once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Rises:
    """By how much torch's allocator rose above the start of named spans, at most: it reports every change.

    Attributes:
        bytes: by the span's name; the largest where a name comes several times.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Spans lie in the body."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
            yield
        events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        for event in events:
            kind, _, name = event.name().partition(" ")
            if kind == "span":
                start = event.start_ns()
                self._note(name, [size for time, size in changes if start <= time <= start + event.duration_ns()])

    def _note(self, name: str, changes: list[int]) -> None:
        alive = most = 0
        for size in changes:
            alive += size
            most = max(most, alive)
        self.bytes[name] = max(most, self.bytes.get(name, 0))

    @staticmethod
    def span(name: str) -> record_function:
        """A part of the body."""
        return record_function(f"span {name}")
