"""Contestants that a session must deal with: one that works, and every way not to."""

import os
from collections.abc import Callable

from benchmarks.harness.parity import Answer
from benchmarks.peers.naive import from_logits
from benchmarks.workloads.logits import Logits

Step = Callable[[], Answer]


def wrong(work: Logits) -> Step:
    """A loss that is a tenth off."""
    right = from_logits(work)

    def step() -> Answer:
        answer = right()
        return Answer(loss=answer.loss * 1.1, gradients=answer.gradients)

    return step


def ends_later(work: Logits) -> Step:
    """A library that takes the process down in the first turn, as running out of memory does."""
    right, calls = from_logits(work), []

    def step() -> Answer:
        calls.append(1)
        if len(calls) > 1:
            os._exit(7)
        return right()

    return step


def lacks_a_part(work: Logits) -> Step:
    """A library that is installed without what it imports late."""
    raise ModuleNotFoundError(f"No module named 'late_part' for {work.vocab} columns", name="late_part")
