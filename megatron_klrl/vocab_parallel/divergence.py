"""Entropy and full-vocabulary KL from vocabulary shards."""

import torch
from torch import Tensor

from megatron_klrl.vocab_parallel.shard import VocabShard


@torch.no_grad()
def entropy(logits: Tensor, *, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """Entropy of the softmax of ``logits / temperature`` at each position.

    Value: ``log Z - E_p[logit]``. Gradient: none (detached).

    Args:
        logits: ``[..., columns]`` this rank's columns.
        shard: where the columns lie.
        temperature: divides the logits.

    Returns:
        ``[...]`` float32 nats.
    """
    real = shard.real(logits) / temperature
    shift, exponentials, total = shard.softmax_terms(real)
    mean = shard.sum((exponentials * (real - shift.unsqueeze(-1))).sum(-1)) / total
    return total.log() - mean


def full_kl(logits: Tensor, ref_logits: Tensor, *, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at each position, given both at the same prefixes.

    Value: ``KL_t = sum_v p_v (log p_v - log q_v)``; summed over the tokens of sequences drawn from the policy it is an
    unbiased, Rao-Blackwellised estimate of the sequence KL (Amini, Vieira, Cotterell 2025, arXiv 2504.10637).
    Gradient: hand-written, with respect to the local logits ``p_v (log p_v - log q_v - KL_t) / temperature``: exactly
        the token-level KL's at this position. None with respect to the reference; padding columns get zero.

    Args:
        logits: ``[..., columns]`` the policy's columns on this rank; never gathered, not modified.
        ref_logits: the reference's, same shape.
        shard: where the columns lie.
        temperature: divides both.

    Returns:
        ``[...]`` float32 nats, never negative up to rounding.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must have one shape")
    return _FullKL.apply(logits, ref_logits, shard, temperature)


class _FullKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, shard, temperature):  # type: ignore[override]
        real, ref = shard.real(logits) / temperature, shard.real(ref_logits) / temperature
        shift, probabilities, total = shard.softmax_terms(real)
        ref_shift, _, ref_total = shard.softmax_terms(ref)
        offset = shift + total.log() - ref_shift - ref_total.log()
        log_ratio = real.sub_(ref).sub_(offset.unsqueeze(-1))
        probabilities.div_(total.unsqueeze(-1))
        value = shard.sum((probabilities * log_ratio).sum(-1))
        ctx.save_for_backward(probabilities, log_ratio, value)
        ctx.temperature, ctx.columns, ctx.dtype = temperature, logits.shape[-1], logits.dtype
        return value

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        probabilities, log_ratio, value = ctx.saved_tensors
        local = probabilities * (log_ratio - value.unsqueeze(-1)) * (grad / ctx.temperature).unsqueeze(-1)
        padding = ctx.columns - local.shape[-1]
        if padding:
            local = torch.nn.functional.pad(local, (0, padding))
        return local.to(ctx.dtype), None, None, None
