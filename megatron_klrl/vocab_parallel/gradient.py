"""The gradient with respect to a piece of logits, from the upstream gradients of its tokens' measures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.shard import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """``[n]`` gradients that arrive at the measures; None, which costs nothing, where none arrives."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    full_kl: Tensor | None = None

    def __bool__(self) -> bool:
        return not (self.logprobs is None and self.entropy is None and self.full_kl is None)

    def of(self, rows: slice) -> "Upstream":
        """For a run of the tokens."""
        return Upstream(
            logprobs=None if self.logprobs is None else self.logprobs[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
            full_kl=None if self.full_kl is None else self.full_kl[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """``[n]`` float32 of the forward that the gradient needs, beside the logits.

    Attributes:
        own_log_z: of this rank's columns alone.
        log_z: of the whole vocabulary; the same tensor where there is one shard.
        logprobs: of the label.
        entropy: at the position; None where it was not measured.
        gap: mean of logit minus reference logit under the policy; None without a reference.
    """

    own_log_z: Tensor
    log_z: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    gap: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """For ``save_for_backward``, in the order of the attributes."""
        return self.own_log_z, self.log_z, self.logprobs, self.entropy, self.gap

    def of(self, rows: slice) -> "Known":
        """For a run of the tokens."""
        return Known(
            own_log_z=self.own_log_z[rows],
            log_z=self.log_z[rows],
            logprobs=self.logprobs[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
            gap=None if self.gap is None else self.gap[rows],
        )


def write(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None,
    upstream: Upstream,
    known: Known,
    shard: VocabShard,
    scale: float,
) -> None:
    """Write the gradient with respect to ``logits`` to ``out``, zero in padding columns.

    Args:
        out: ``[n, columns]``; may be ``logits`` itself.
        logits: ``[n, columns]``.
        labels: ``[n]``.
        ref_logits: ``[n, columns]``; read only where a gradient arrives at ``full_kl``.
        upstream: what arrives.
        known: from the forward.
        shard: where the columns lie.
        scale: one over the temperature.
    """
    real = slice(0, shard.size)
    out[:, shard.size :].zero_()
    if not shard.size:
        return
    coefficients = _coefficients(upstream, known, scale)
    ref = ref_logits if upstream.full_kl is not None else None
    column, inside = shard.locate(labels)
    at = column.unsqueeze(-1)
    at_label = None
    if upstream.logprobs is not None:
        rest = _rest_at_label(upstream, known, logits, ref, at, scale)
        # 1 - p from the log-probability: exact for a p close to one, whatever the type of the logits
        at_label = (upstream.logprobs * -torch.expm1(known.logprobs) + rest) * scale
    kernels.gradient(
        out[:, real],
        logits[:, real],
        None if ref is None else ref[:, real],
        scale=scale,
        log_z=known.own_log_z,
        coefficients=coefficients,
    )
    if at_label is not None:
        where = torch.arange(len(out), device=out.device), column
        out[where] = torch.where(inside, at_label.to(out.dtype), out[where])  # scatter_ would copy all of a bf16 tensor


def _coefficients(upstream: Upstream, known: Known, scale: float) -> dict[str, Tensor]:
    """Of ``p (constant + slope x + tilt (x - y))``, with ``p`` the softmax over this rank's columns alone."""
    mass = scale if known.own_log_z is known.log_z else (known.own_log_z - known.log_z).exp() * scale
    constant = torch.zeros_like(known.log_z) if upstream.logprobs is None else -upstream.logprobs
    found = {}
    if upstream.entropy is not None and known.entropy is not None:
        constant = constant + upstream.entropy * (known.log_z - known.entropy)
        found["slope"] = -upstream.entropy * mass
    if upstream.full_kl is not None and known.gap is not None:
        constant = constant - upstream.full_kl * known.gap
        found["tilt"] = upstream.full_kl * mass
    found["constant"] = constant * mass
    return {name: value.unsqueeze(-1) for name, value in found.items()}


def _rest_at_label(
    upstream: Upstream, known: Known, logits: Tensor, ref_logits: Tensor | None, at: Tensor, scale: float
) -> Tensor:
    """What entropy and KL add to the label's own entry, ``[n]``, before the scale."""
    factor = torch.zeros_like(known.logprobs)
    if upstream.entropy is not None and known.entropy is not None:
        factor = factor - upstream.entropy * (known.logprobs + known.entropy)
    if upstream.full_kl is not None and known.gap is not None and ref_logits is not None:
        difference = (logits.gather(-1, at).float() - ref_logits.gather(-1, at).float()).squeeze(-1)
        factor = factor + upstream.full_kl * (difference * scale - known.gap)
    return known.logprobs.exp() * factor
