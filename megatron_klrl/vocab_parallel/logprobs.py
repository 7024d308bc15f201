"""Log-probabilities of given tokens from vocabulary shards."""

import torch
from torch import Tensor

from megatron_klrl.vocab_parallel.shard import VocabShard


def token_logprobs(logits: Tensor, labels: Tensor, *, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """Natural-log probability of each label under the softmax of ``logits / temperature``.

    Value: exact; the softmax is taken over all shards and accumulated in float32, padding columns carry no mass.
    Gradient: hand-written; with respect to the local logits it is ``(1[v = label] - p_v) / temperature``.
    Padding columns get gradient zero. The label's log-probability is the same on every rank of the shard's group, and
    each rank must receive the same upstream gradient.

    Args:
        logits: ``[..., columns]`` this rank's columns, any float dtype; never gathered, not modified.
        labels: ``[...]`` int64 vocabulary indices, the same on every rank of the group.
        shard: where the columns lie.
        temperature: divides the logits; the sampling temperature.

    Returns:
        ``[...]`` float32 nats.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} less its last"
        )
    return _TokenLogprobs.apply(logits, labels, shard, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, shard, temperature):  # type: ignore[override]
        real = shard.real(logits)
        if temperature != 1.0:
            real = real / temperature
        shift = shard.max(real.amax(-1))
        exponentials = torch.exp(real - shift.unsqueeze(-1))
        column, inside = shard.locate(labels)
        picked = real.gather(-1, column.unsqueeze(-1)).squeeze(-1) - shift
        picked = torch.where(inside, picked, 0.0)
        # one all-reduce carries both sums: the latency of a collective is what counts here
        total, picked = shard.sum(torch.stack([exponentials.sum(-1), picked]))
        probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, column, inside)
        ctx.temperature, ctx.columns, ctx.dtype = temperature, logits.shape[-1], logits.dtype
        return picked - total.log()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        probabilities, column, inside = ctx.saved_tensors
        if ctx.temperature != 1.0:
            grad = grad / ctx.temperature
        local = probabilities * -grad.unsqueeze(-1)
        local.scatter_add_(-1, column.unsqueeze(-1), (grad * inside).unsqueeze(-1))
        padding = ctx.columns - local.shape[-1]
        if padding:
            local = torch.nn.functional.pad(local, (0, padding))
        return local.to(ctx.dtype), None, None, None
