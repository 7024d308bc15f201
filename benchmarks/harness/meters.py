"""Time and extra peak memory of a call, in the process that makes it."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Larger than the L2 cache of any GPU so far (B200: 126 MB): writing it leaves nothing of the inputs there.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One turn.

    Attributes:
        seconds: per call; on CPU the process's CPU time, user and system over all threads, on CUDA between two events.
        wall_s: per call, by the wall clock; on CPU it depends on what else runs, and is for information.
        peak_bytes: what the calls needed at their worst on top of what was there before, their results included.
    """

    seconds: float
    wall_s: float
    peak_bytes: int


def read_cpu(call: Callable[[], object], *, restore: Callable[[], None], calls: int) -> Reading:
    """Time and memory of ``calls`` calls; ``restore`` makes the inputs whole before each and is not counted."""
    restore()
    return_free_memory()
    before = resident_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")
    seconds = wall_s = 0.0
    for number in range(calls):
        if number:
            restore()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        seconds += time.process_time() - cpu
        wall_s += time.perf_counter() - wall
    peak = resident_bytes("VmHWM")
    return Reading(seconds=seconds / calls, wall_s=wall_s / calls, peak_bytes=max(0, peak - before))


def resident_bytes(field: str) -> int:
    """``VmRSS``, what is resident, or ``VmHWM``, the most that was since the peak was last reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}: memory is measured on Linux only")
    return int(found.group(1)) * 1024


def return_free_memory() -> None:
    """Give freed memory back to the system, so that what was resident before does not hide what a call takes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def read_cuda(call: Callable[[], object], *, restore: Callable[[], None], calls: int) -> Reading:
    """The same on a GPU: events around each call, with the L2 cache emptied before it.

    An uncounted call comes first, so that torch has its memory; afterwards it is given back, because the other
    contestants are on the same GPU.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    restore()
    call()
    restore()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    wall_s = 0.0
    for number, (start, end) in enumerate(events):
        if number:
            restore()
        flush.zero_()
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        wall_s += time.perf_counter() - wall
    seconds = sum(start.elapsed_time(end) for start, end in events) / 1000
    peak = torch.cuda.max_memory_allocated() - before
    del flush
    return_free_memory()
    return Reading(seconds=seconds / calls, wall_s=wall_s / calls, peak_bytes=peak)
