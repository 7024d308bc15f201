"""Megatron-Core: its two vocabulary-parallel cross entropies. Both write over the logits; neither gives an entropy."""

from collections.abc import Callable

import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from benchmarks.harness.parity import Answer
from benchmarks.workloads.logits import Logits

Step = Callable[[], Answer]


def from_logits(work: Logits, *, fused: bool) -> Step:
    """The log-probability is the negative cross entropy of the label."""
    group = dist.group.WORLD

    def step() -> Answer:
        if fused:
            losses = fused_vocab_parallel_cross_entropy(work.logits, work.labels, group)
        else:
            losses = vocab_parallel_cross_entropy(work.logits, work.labels, tp_group=group)
        return work.answer(-losses, None)

    return step
