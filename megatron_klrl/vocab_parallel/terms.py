"""The numbers that one pass over a token's logits leaves, and how those of several vocabulary shards become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.shard import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """``[n]`` float32 each, in nats; of one rank's columns, or of the whole vocabulary.

    Attributes:
        log_z: logarithm of the sum of the exponentials of the logits, divided by the temperature like all below.
        label: the label's logit; -inf where the label is not among the columns.
        entropy: of the softmax over the columns.
        ref_log_z: the reference's log_z.
        ref_label: the reference's logit of the label.
        gap: mean of logit minus reference logit under the softmax over the columns.
        full_kl: KL of the two softmaxes over the columns.
    """

    log_z: Tensor
    label: Tensor
    entropy: Tensor | None = None
    ref_log_z: Tensor | None = None
    ref_label: Tensor | None = None
    gap: Tensor | None = None
    full_kl: Tensor | None = None


def of_columns(
    logits: Tensor, labels: Tensor, *, shard: VocabShard, scale: float, ref_logits: Tensor | None, entropy: bool
) -> Terms:
    """Of this rank's columns alone, from ``[n, columns]`` logits and ``[n]`` labels."""
    column, inside = shard.locate(labels)
    real, ref = logits[:, : shard.size], None if ref_logits is None else ref_logits[:, : shard.size]
    if shard.size:
        found = kernels.partition(real, ref, scale=scale, entropy=entropy)
    else:
        found = _of_no_columns(labels, compared=ref is not None, entropy=entropy)
    found["label"] = _picked(logits, column, inside, scale)
    if ref_logits is not None:
        found["ref_label"] = _picked(ref_logits, column, inside, scale)
    return Terms(**found)


def _of_no_columns(labels: Tensor, *, compared: bool, entropy: bool) -> dict[str, Tensor]:
    zero = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    none = torch.full_like(zero, -math.inf)
    found = {"log_z": none} | ({"entropy": zero} if entropy else {})
    return found | ({"ref_log_z": none, "gap": zero, "full_kl": zero} if compared else {})


def _picked(logits: Tensor, column: Tensor, inside: Tensor, scale: float) -> Tensor:
    picked = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).float() * scale
    return torch.where(inside, picked, -math.inf)


def joined(parts: Sequence[Terms]) -> Terms:
    """Of several runs of tokens, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Terms(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _names(parts[0])})


def over_ranks(local: Terms, *, shard: VocabShard) -> Terms:
    """Of the whole vocabulary, the same numbers on every rank: one all-gather of at most seven floats per token.

    Entropy and KL follow the chain rule: the shards' masses are a distribution over shards, whose own entropy or KL
    comes on top of the mean of the shards' ones. So nothing is a difference of large numbers, and no sum is taken
    before every rank's is known: no second collective.
    """
    if shard.group is None:
        return local
    names = _names(local)
    gathered = shard.gather(torch.stack([getattr(local, name) for name in names]))
    part = dict(zip(names, gathered.unbind(1), strict=True))
    log_z = part["log_z"].logsumexp(0)
    log_mass = part["log_z"] - log_z
    mass = log_mass.exp()
    found = {"log_z": log_z, "label": part["label"].amax(0)}
    if "entropy" in part:
        found["entropy"] = _mean(mass, part["entropy"] - log_mass)
    if "full_kl" in part:
        ref_log_z = part["ref_log_z"].logsumexp(0)
        ref_log_mass = part["ref_log_z"] - ref_log_z
        found |= {
            "ref_log_z": ref_log_z,
            "ref_label": part["ref_label"].amax(0),
            "gap": _mean(mass, part["gap"]),
            "full_kl": _mean(mass, part["full_kl"]) + _between(mass, ref_log_mass.exp(), log_mass - ref_log_mass),
        }
    return Terms(**found)


def _mean(mass: Tensor, value: Tensor) -> Tensor:
    """Over the shards; one without columns or mass has no say, whatever its value."""
    return torch.where(mass == 0, 0.0, mass * value).sum(0)


def _between(mass: Tensor, ref_mass: Tensor, log_ratio: Tensor) -> Tensor:
    """KL of the distributions over shards, with terms as in :func:`bodies.divergence`."""
    near = _mean(mass, torch.expm1(-log_ratio.clamp(min=-1.0)) + log_ratio)
    return near + torch.relu(ref_mass - math.e * mass).sum(0)


def _names(terms: Terms) -> list[str]:
    return [field.name for field in fields(terms) if getattr(terms, field.name) is not None]
