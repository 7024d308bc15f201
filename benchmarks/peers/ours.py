"""This project: measures from logits and from hidden states."""

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import policy_loss
from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.head import fused_loss, measure_hidden
from megatron_klrl.vocab_parallel.measures import TokenMeasures, measure
from megatron_klrl.vocab_parallel.shard import VocabShard

Step = Callable[[], Answer]


def from_logits(
    work: Logits, *, entropy: bool = True, overwrite: bool = False, form: str = kernels.Kernels.AUTO
) -> Step:
    """``measure``, on all columns or on this rank's."""
    kernels.use(kernels.Kernels(form))
    _refuse_uncompiled()
    alone = dist.get_world_size() == 1
    shard = VocabShard(start=work.start, size=work.logits.shape[-1], group=None if alone else dist.group.WORLD)

    def step() -> Answer:
        with torch.set_grad_enabled(work.train):
            found = measure(work.logits, work.labels, shard=shard, entropy=entropy, overwrite=overwrite)
            return work.answer(found.logprobs, found.entropy)

    return step


def from_hidden(work: Hidden, *, entropy: bool = True, chunk_tokens: int | None = None) -> Step:
    """``measure_hidden``: all logits kept for the backward, or a chunk of them at a time and computed twice."""
    _refuse_uncompiled()
    shard = VocabShard.whole(len(work.weight))
    labels = work.labels.view(-1)

    def step() -> Answer:
        hidden = work.hidden.view(len(labels), -1)
        found = measure_hidden(hidden, work.weight, labels, shard=shard, entropy=entropy, chunk_tokens=chunk_tokens)
        logprobs = found.logprobs.view(work.labels.shape)
        spread = None if found.entropy is None else found.entropy.view(work.labels.shape)
        return work.answer(policy_loss(logprobs, work.targets), logprobs, spread)

    return step


def from_hidden_fused(work: Hidden, *, chunk_tokens: int, entropy: bool = True) -> Step:
    """``fused_loss``: the loss chunk by chunk inside the forward, gradients accumulated there."""
    _refuse_uncompiled()
    shard = VocabShard.whole(len(work.weight))
    labels = work.labels.view(-1)
    count = len(labels)
    chunks = [slice(first, min(first + chunk_tokens, count)) for first in range(0, count, chunk_tokens)]

    def step() -> Answer:
        kept: list[TokenMeasures] = []

        def chunk_loss(found: TokenMeasures, number: int) -> Tensor:
            kept.append(found)
            return policy_loss(found.logprobs, work.targets, rows=chunks[number])

        hidden = work.hidden.view(count, -1)
        loss = fused_loss(hidden, work.weight, labels, shard=shard, loss=chunk_loss, chunks=chunks, entropy=entropy)
        logprobs = torch.cat([each.logprobs.detach() for each in kept]).view(work.labels.shape)
        spread = [each.entropy.detach() for each in kept if each.entropy is not None]
        return work.answer(loss, logprobs, torch.cat(spread).view(work.labels.shape) if spread else None)

    return step


def _refuse_uncompiled() -> None:
    """Kernels that cannot be compiled run uncompiled after a warning: right for training, not for a figure."""
    warnings.filterwarnings("error", message="The passes over the logits run uncompiled", category=RuntimeWarning)
