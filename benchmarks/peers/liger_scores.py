"""Liger's forward-only log-probabilities from logits, a Triton kernel."""

from collections.abc import Callable

from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

from benchmarks.harness.parity import Answer
from benchmarks.workloads.logits import Logits

Step = Callable[[], Answer]


def from_logits(work: Logits) -> Step:
    """``fused_selective_log_softmax``, which wants one position more than it scores."""
    work.leave_room(1)

    def step() -> Answer:
        return work.answer(fused_selective_log_softmax(work.buffer, work.labels, temperature=1.0), None)

    return step
