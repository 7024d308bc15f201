"""Measures of each token, or the loss made of them, from final hidden states and the output layer.

Three forms, which differ in what is alive and in how many products with the output layer they take; see
docs/design/policy-head.md. Products are taken in the type of hidden states and weight, as the model's own output layer
and the generation engine take them; what is summed over chunks is summed in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_klrl.vocab_parallel import gradient, terms
from megatron_klrl.vocab_parallel.gradient import Known, Upstream
from megatron_klrl.vocab_parallel.measures import (
    MEASURES,
    How,
    TokenMeasures,
    known,
    measure,
    measure_against,
    measured,
    values,
)
from megatron_klrl.vocab_parallel.products import ReferenceHead, Scratch, WeightGradient
from megatron_klrl.vocab_parallel.shard import VocabShard
from megatron_klrl.vocab_parallel.terms import Terms

__all__ = ["ReferenceHead", "fused_loss", "measure_hidden"]


def measure_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    reference: ReferenceHead | None = None,
    entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenMeasures:
    """Measures of each token; differentiable in ``hidden`` and ``weight``.

    Value and gradient: those of :func:`measures.measure` of ``hidden @ weight.T``. The gradient of ``hidden`` is this
    rank's part: whoever calls sums it over the vocabulary's group, as Megatron's
    ``copy_to_tensor_model_parallel_region`` does. One all-gather of a few floats per token.
    Memory: without ``chunk_tokens`` the logits, over which the backward writes their gradient (three products); with
    it one chunk of logits, forward and backward (four products; one without gradient), and as much again for a
    reference. A second backward needs ``chunk_tokens``.

    Args:
        hidden: ``[n, width]``.
        weight: ``[columns, width]``, of the same type.
        labels: ``[n]``; see ``measure``.
        shard: where the columns lie.
        temperature: divides the logits.
        reference: gives ``full_kl`` and ``ref_logprobs``.
        entropy: whether to give it.
        chunk_tokens: most tokens whose logits are alive at once.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check(hidden, weight, labels, shard, reference)
    how = How(shard=shard, temperature=temperature, entropy=entropy)
    if chunk_tokens is None:
        logits = torch.nn.functional.linear(hidden, weight)
        if reference is not None:
            return measure_against(logits, labels, reference=reference, how=how)
        return measure(logits, labels, shard=shard, temperature=temperature, entropy=entropy, overwrite=True)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    count = len(labels)
    starts = range(0, max(count, 1), chunk_tokens)
    chunks = [slice(start, min(start + chunk_tokens, count)) for start in starts]
    ref = (None, None) if reference is None else (reference.hidden, reference.weight)
    return measured(_Chunked.apply(hidden, weight, labels, *ref, how, chunks))


def fused_loss(  # noqa: PLR0913  two tensors more than a loss has anyway
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    loss: Callable[[TokenMeasures, int], Tensor],
    chunks: Sequence[slice],
    temperature: float = 1.0,
    reference: ReferenceHead | None = None,
    entropy: bool = False,
) -> Tensor:
    """Sum of a loss over chunks of tokens, whose gradient is taken chunk by chunk inside the forward.

    Value: ``sum_i loss(measures of the tokens chunks[i], i)``.
    Gradient: the same as through :func:`measure_hidden`, with respect to ``hidden`` (this rank's part) and ``weight``.
    Three products and one chunk of logits alive: the loss must be a sum over the chunks, and everything in it but the
    measures a constant. The backward only multiplies by the upstream gradient; there is no second one.
    Communication: one all-gather of a few floats per token and chunk; every rank must pass the same chunks.

    Args:
        hidden: ``[n, width]``.
        weight: ``[columns, width]``, of the same type.
        labels: ``[n]``; see ``measure``.
        shard: where the columns lie.
        loss: takes the measures of a chunk's tokens and the chunk's number, returns a scalar. Called once per chunk, in
            order, with gradients enabled where they are enabled outside.
        chunks: runs of tokens that cover ``[0, n)`` in order; lengths may differ.
        temperature: divides the logits.
        reference: gives ``full_kl`` and ``ref_logprobs``.
        entropy: whether the measures have it.

    Raises:
        ValueError: shapes or types do not fit together, or the chunks do not cover the tokens.
        RuntimeError: in a second backward.
    """
    _check(hidden, weight, labels, shard, reference)
    end = 0
    for chunk in chunks:
        if chunk.start != end or chunk.stop < chunk.start or chunk.step not in (None, 1):
            raise ValueError(f"chunks must be runs of tokens that follow one another; after {end} comes {chunk}")
        end = chunk.stop
    if end != len(labels):
        raise ValueError(f"chunks end at {end}, but there are {len(labels)} tokens")
    how = How(shard=shard, temperature=temperature, entropy=entropy)
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    job = _Job(how=how, chunks=chunks, loss=loss, differentiated=differentiated)
    return _Fused.apply(hidden, weight, labels, reference, job)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, reference: ReferenceHead | None) -> None:
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be [n, width], and labels {tuple(labels.shape)} [n]")
    _check_head("", hidden, weight)
    if len(weight) < shard.size:
        raise ValueError(f"weight {tuple(weight.shape)} must have the {shard.size} columns of the vocabulary shard")
    if reference is None:
        return
    _check_head("reference.", reference.hidden, reference.weight)
    if len(reference.hidden) != len(hidden) or len(reference.weight) != len(weight):
        raise ValueError(
            f"reference.hidden {tuple(reference.hidden.shape)} and reference.weight {tuple(reference.weight.shape)} "
            f"must have the tokens of hidden {tuple(hidden.shape)} and the columns of weight {tuple(weight.shape)}"
        )


def _check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}hidden {tuple(hidden.shape)} and {name}weight {tuple(weight.shape)} must have one width"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{name}hidden is {hidden.dtype} and {name}weight {weight.dtype}; they must have one type")


class _Pair:
    """Logits of the policy, and of the reference, for a chunk at a time in memory that is used again."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, reference: ReferenceHead | None, chunks: Sequence[slice]
    ) -> None:
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        self._policy = Scratch(hidden, weight, rows=rows)
        self._reference = None if reference is None else Scratch(reference.hidden, reference.weight, rows=rows)

    def policy(self, chunk: slice) -> Tensor:
        return self._policy.logits(chunk)

    def reference(self, chunk: slice) -> Tensor | None:
        return None if self._reference is None else self._reference.logits(chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, ref_hidden, ref_weight, how, chunks):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        reference = None if ref_hidden is None else ReferenceHead(hidden=ref_hidden, weight=ref_weight)
        pair = _Pair(hidden, weight, reference, chunks)
        own = terms.joined(
            [_of_chunk(pair.policy(chunk), pair.reference(chunk), labels[chunk], how) for chunk in chunks]
        )
        whole = terms.over_ranks(own, shard=how.shard)
        found = values(whole)
        of_forward = known(own, whole, found[0])
        ctx.save_for_backward(hidden, weight, labels, ref_hidden, ref_weight, *of_forward.tensors())
        ctx.how, ctx.chunks = how, chunks
        ctx.mark_non_differentiable(*([] if found[3] is None else [found[3]]))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        upstream = Upstream(**dict(zip(MEASURES[:3], grads[:3], strict=True)))
        if not upstream:
            return (None,) * 7
        hidden, weight, labels, ref_hidden, ref_weight, own_log_z, log_z, logprobs, entropy, gap = ctx.saved_tensors
        compared = upstream.full_kl is not None
        reference = ReferenceHead(hidden=ref_hidden, weight=ref_weight) if compared else None
        pair = _Pair(hidden, weight, reference, ctx.chunks)
        of_forward = Known(own_log_z=own_log_z, log_z=log_z, logprobs=logprobs, entropy=entropy, gap=gap)
        sums = _Gradients(hidden, weight, ctx.needs_input_grad, ctx.chunks)
        for chunk in ctx.chunks:
            logits = pair.policy(chunk)
            gradient.write(
                logits,
                logits,
                labels[chunk],
                ref_logits=pair.reference(chunk),
                upstream=upstream.of(chunk),
                known=of_forward.of(chunk),
                shard=ctx.how.shard,
                scale=ctx.how.scale,
            )
            sums.add(chunk, logits)
        return (*sums.result(), None, None, None, None, None)


class _Gradients:
    """Of hidden states and weight, from the gradient of the logits of one chunk after the other."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: Sequence[bool], chunks: Sequence[slice]) -> None:
        self._source, self._output_layer = hidden, weight
        self._hidden = torch.zeros_like(hidden) if needed[0] else None
        self._weight = WeightGradient(weight, parts=len(chunks)) if needed[1] else None

    def add(self, chunk: slice, of_logits: Tensor) -> None:
        if self._hidden is not None:
            torch.mm(of_logits, self._output_layer, out=self._hidden[chunk])
        if self._weight is not None:
            self._weight.add(of_logits, self._source[chunk])

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        return self._hidden, None if self._weight is None else self._weight.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What ``fused_loss`` is asked, beside the tensors."""

    how: How
    chunks: Sequence[slice]
    loss: Callable[[TokenMeasures, int], Tensor]
    differentiated: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, reference, job):  # type: ignore[override]
        pair = _Pair(hidden, weight, reference, job.chunks)
        needed = ctx.needs_input_grad if job.differentiated else (False, False)
        sums = _Gradients(hidden, weight, needed, job.chunks)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for number, chunk in enumerate(job.chunks):
            logits, ref_logits = pair.policy(chunk), pair.reference(chunk)
            own = _of_chunk(logits, ref_logits, labels[chunk], job.how)
            whole = terms.over_ranks(own, shard=job.how.shard)
            found = values(whole)
            value, upstream = _loss_of_chunk(job, found, number)
            total += value
            if upstream:
                gradient.write(
                    logits,
                    logits,
                    labels[chunk],
                    ref_logits=ref_logits,
                    upstream=upstream,
                    known=known(own, whole, found[0]),
                    shard=job.how.shard,
                    scale=job.how.scale,
                )
                sums.add(chunk, logits)
        ctx.gradients = sums.result()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("fused_loss has no second backward: the first one used the memory of its gradients")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        # asking for the value would wait for a GPU, while on CPU it saves a pass over the largest tensor there is
        if grad.device.type != "cpu" or float(grad) != 1.0:
            for part in (of_hidden, of_weight):
                if part is not None:
                    part.mul_(grad)
        return of_hidden, of_weight, None, None, None


def _of_chunk(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, how: How) -> Terms:
    return terms.of_columns(
        logits, labels, shard=how.shard, scale=how.scale, ref_logits=ref_logits, entropy=how.entropy
    )


def _loss_of_chunk(job: _Job, found: tuple[Tensor | None, ...], number: int) -> tuple[Tensor, Upstream]:
    """Value of a chunk, and the gradients with respect to its measures."""
    if not job.differentiated:
        return job.loss(measured(found), number).detach(), Upstream()
    leaves = [None if value is None else value.detach().requires_grad_() for value in found[:3]]
    with torch.enable_grad():
        value = job.loss(measured((*leaves, found[3])), number)
    if not value.requires_grad:
        return value, Upstream()
    arrived = iter(torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], allow_unused=True))
    grads = (None if leaf is None else next(arrived) for leaf in leaves)
    return value.detach(), Upstream(**dict(zip(MEASURES[:3], grads, strict=True)))
