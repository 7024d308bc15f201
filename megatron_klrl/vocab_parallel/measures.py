"""Log-probability, entropy and full-vocabulary KL of each token, from logits that are cut over the vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_klrl.vocab_parallel import gradient, terms
from megatron_klrl.vocab_parallel.gradient import Known, Upstream
from megatron_klrl.vocab_parallel.products import ReferenceHead, reference_logits
from megatron_klrl.vocab_parallel.shard import VocabShard
from megatron_klrl.vocab_parallel.terms import Terms

MEASURES = ("logprobs", "entropy", "full_kl", "ref_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMeasures:
    """What is known of each token, float32, in nats, the same on every rank of the vocabulary's group.

    Attributes:
        logprobs: of the label. Gradient with respect to logit v: ``(1[v = label] - p_v) / temperature``.
        entropy: of the policy at the position; None unless asked for. Gradient
            ``-p_v (log p_v + entropy) / temperature``.
        full_kl: KL(policy || reference) over the vocabulary at the position; None without a reference. Gradient
            ``p_v (log p_v - log q_v - full_kl) / temperature``, none with respect to the reference.
        ref_logprobs: the reference's of the label, never differentiable; None without a reference.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    full_kl: Tensor | None = None
    ref_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What is measured, beside the tensors.

    Attributes:
        shard: where this rank's columns lie.
        temperature: divides the logits, the policy's and the reference's.
        entropy: whether it is wanted.
    """

    shard: VocabShard
    temperature: float
    entropy: bool

    @property
    def scale(self) -> float:
        """Multiplies the logits."""
        return 1.0 / self.temperature


def measure(
    logits: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    ref_logits: Tensor | None = None,
    entropy: bool = False,
    overwrite: bool = False,
) -> TokenMeasures:
    """Measures of each position from logits that exist.

    Value: exact, over all shards, in float32 for every type of logits; docs/design/policy-head.md has the error bounds.
    A logit of -inf makes entropy and KL of its position not a number; other non-finite logits make everything so.
    Gradient: hand-written, from the logits and a few numbers per token; see :class:`TokenMeasures`. It has the logits'
    type and is zero in padding columns. Every rank must receive the same upstream gradient.
    Communication: one all-gather of a few floats per token in the forward, none in the backward.

    Args:
        logits: ``[..., columns]`` this rank's columns, any float dtype; those from ``shard.size`` on are padding and
            carry no mass. Never gathered. Not modified by the forward.
        labels: ``[...]`` int64 vocabulary indices, the same on every rank. Nothing checks their range. A label outside
            the vocabulary, such as -100, has log-probability -inf, which no mask of zeros takes out of a sum
            (0 x inf): leave such positions out before.
        shard: where the columns lie.
        temperature: divides the logits.
        ref_logits: the reference's at the same prefixes, shape of ``logits``; gives ``full_kl`` and ``ref_logprobs``.
        entropy: whether to give it.
        overwrite: let the backward write the gradient over the logits' own memory, so that it takes none. The logits
            are gone then, and there is no second backward.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: in a second backward with ``overwrite``.
    """
    if logits.ndim == 0 or logits.shape[-1] < shard.size:
        raise ValueError(f"logits {tuple(logits.shape)} must have the {shard.size} columns of the vocabulary shard")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} less its last"
        )
    if ref_logits is not None and logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must have one shape")
    how = How(shard=shard, temperature=temperature, entropy=entropy)
    return measured(_Measure.apply(logits, labels, ref_logits, None, None, how, overwrite))


def measure_against(logits: Tensor, labels: Tensor, *, reference: ReferenceHead, how: How) -> TokenMeasures:
    """As :func:`measure` with ``overwrite``, for ``[n, columns]`` logits and a reference without stored logits.

    The backward takes the product with the reference's output layer again, if a gradient arrives at ``full_kl``.
    """
    return measured(_Measure.apply(logits, labels, None, reference.hidden, reference.weight, how, True))


def measured(found: tuple[Tensor | None, ...]) -> TokenMeasures:
    """From the tuple that autograd handles."""
    return TokenMeasures(**dict(zip(MEASURES, found, strict=True)))  # type: ignore[arg-type]


def values(found: Terms) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The measures, in the order of ``MEASURES``, from the terms of the whole vocabulary."""
    ref_logprobs = None
    if found.ref_label is not None and found.ref_log_z is not None:
        ref_logprobs = found.ref_label - found.ref_log_z
    return found.label - found.log_z, found.entropy, found.full_kl, ref_logprobs


def known(own: Terms, whole: Terms, logprobs: Tensor) -> Known:
    """What the gradient needs of the forward's terms."""
    return Known(own_log_z=own.log_z, log_z=whole.log_z, logprobs=logprobs, entropy=whole.entropy, gap=whole.gap)


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ref_logits, ref_hidden, ref_weight, how, overwrite):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        flat, parts = labels.reshape(-1), []
        for rows, reference, policy in _pieces(ref_logits, ref_hidden, ref_weight, logits):
            parts.append(
                terms.of_columns(
                    policy, flat[rows], shard=how.shard, scale=how.scale, ref_logits=reference, entropy=how.entropy
                )
            )
        own = terms.joined(parts)
        whole = terms.over_ranks(own, shard=how.shard)
        found = values(whole)
        of_forward = known(own, whole, found[0])
        ctx.save_for_backward(logits, labels, ref_logits, ref_hidden, ref_weight, *of_forward.tensors())
        ctx.how, ctx.overwrite, ctx.used = how, overwrite, False
        shaped = tuple(None if value is None else value.view(labels.shape) for value in found)
        ctx.mark_non_differentiable(*([] if shaped[3] is None else [shaped[3]]))
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        flattened = (None if grad is None else grad.reshape(-1) for grad in grads[:3])
        upstream = Upstream(**dict(zip(MEASURES[:3], flattened, strict=True)))
        if not upstream:
            return (None,) * 7
        if ctx.used:
            raise RuntimeError(
                "no second backward: the first one wrote the gradient over the logits, as overwrite asks"
            )
        ctx.used = ctx.overwrite
        logits, labels, ref_logits, ref_hidden, ref_weight, own_log_z, log_z, logprobs, entropy, gap = ctx.saved_tensors
        of_forward = Known(own_log_z=own_log_z, log_z=log_z, logprobs=logprobs, entropy=entropy, gap=gap)
        if upstream.full_kl is None:
            ref_logits = ref_hidden = ref_weight = None
        logits, flat = logits.detach(), labels.reshape(-1)
        out = logits if ctx.overwrite else torch.empty_like(logits)
        for rows, reference, target, policy in _pieces(ref_logits, ref_hidden, ref_weight, out, logits):
            gradient.write(
                target,
                policy,
                flat[rows],
                ref_logits=reference,
                upstream=upstream.of(rows),
                known=of_forward.of(rows),
                shard=ctx.how.shard,
                scale=ctx.how.scale,
            )
        return (out, *(None,) * 6)


def _pieces(
    ref_logits: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, *tensors: Tensor
) -> Iterator[tuple]:
    """``(run of tokens, reference logits or None, [n, columns] views of the tensors)``, in order."""
    if ref_hidden is not None and ref_weight is not None:
        reference = ReferenceHead(hidden=ref_hidden, weight=ref_weight)
        yield from ((rows, found, *(each[rows] for each in tensors)) for rows, found in reference_logits(reference))
        return
    start = 0
    for *views, reference in _views(*tensors, ref_logits):
        rows = slice(start, start + len(views[0]))
        yield rows, reference, *views
        start = rows.stop


def _views(first: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The same ``[n, columns]`` views of every tensor, in order: one where memory allows, else more; never a copy."""
    try:
        yield tuple(None if each is None else each.view(-1, each.shape[-1]) for each in (first, *others))
    except RuntimeError:  # a slice of a batch of sequences: rows of one batch entry lie evenly, the whole does not
        for number in range(len(first)):
            yield from _views(first[number], *(None if each is None else each[number] for each in others))
