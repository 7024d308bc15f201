"""Entropy and full-vocabulary KL from vocabulary shards, as values (no gradient)."""

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


@torch.no_grad()
def full_kl(logits: Tensor, ref_logits: Tensor, *, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at each position, given both at the same prefixes.

    Value: ``sum_v p_v (log p_v - log q_v)``; summed over the tokens of sequences drawn from the policy it is an
    unbiased, Rao-Blackwellised estimate of the sequence KL (Amini, Vieira, Cotterell 2025, arXiv 2504.10637).
    Gradient: none (detached).

    Args:
        logits: ``[..., columns]`` the policy's columns on this rank.
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
    real, ref = shard.real(logits) / temperature, shard.real(ref_logits) / temperature
    shift, exponentials, total = shard.softmax_terms(real)
    ref_shift, _, ref_total = shard.softmax_terms(ref)
    gap = (real - shift.unsqueeze(-1)) - (ref - ref_shift.unsqueeze(-1))
    return shard.sum((exponentials * gap).sum(-1)) / total - total.log() + ref_total.log()
