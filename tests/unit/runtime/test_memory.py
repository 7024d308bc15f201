"""Memory of a phase, on CPU: what is resident when it ends."""

import torch

from megatron_klrl.runtime.memory import MemoryMeter
from megatron_klrl.runtime.timers import Timers

GIB = 2**30
QUARTER = GIB // 4


def test_a_phase_shows_what_is_held_at_its_end_and_the_peak_what_was_ever_held() -> None:
    meter = MemoryMeter()
    with meter.phase("before"):
        pass
    with meter.phase("holding"):
        held = torch.ones(QUARTER, dtype=torch.int8)  # above glibc's largest mmap threshold: freed means given back
    del held
    with meter.phase("after"):
        pass
    found = meter.take()
    # a sixteenth for whatever else the process does meanwhile
    assert found["memory/holding_gib"] - found["memory/before_gib"] > 3 / 16
    assert found["memory/holding_gib"] - found["memory/after_gib"] > 3 / 16
    assert found["memory/peak_gib"] >= found["memory/holding_gib"]


def test_phases_are_taken_once_and_the_peak_stays() -> None:
    timers = Timers()
    with timers.span("step"), timers.phase("train"):
        pass
    first = timers.take()
    assert set(first) == {"time/step_s", "time/train_s", "memory/train_gib", "memory/peak_gib"}
    second = timers.take()
    assert set(second) == {"memory/peak_gib"}
    assert second["memory/peak_gib"] >= first["memory/peak_gib"]
