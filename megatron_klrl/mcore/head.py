"""The output layer and the loss at the last pipeline stage: from hidden states, at response positions alone.

Prompt and padding tokens never meet the vocabulary. Whole rows are put together again from the ranks that hold their
parts only after the vocabulary is gone, so the losses know nothing of packing or context parallelism.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_klrl.batch import TrainBatch
from megatron_klrl.losses.policy_loss import PolicyLoss, Separable
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.microbatches import Microbatch
from megatron_klrl.mcore.passes import AtHead
from megatron_klrl.vocab_parallel.head import ReferenceHead, fused_loss, measure_hidden
from megatron_klrl.vocab_parallel.measures import TokenMeasures
from megatron_klrl.vocab_parallel.shard import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How the last stage computes.

    Attributes:
        shard: this rank's columns of the vocabulary.
        groups: the layout.
        sequence_parallel: hidden states arrive cut along the sequence.
        temperature: divides the logits.
        chunk_tokens: most tokens whose logits are alive at once; None takes all of a microbatch.
    """

    shard: VocabShard
    groups: ProcessGroups
    sequence_parallel: bool
    temperature: float
    chunk_tokens: int | None

    def select(self, microbatch: Microbatch, at: AtHead) -> Tensor:
        """``[n, hidden]`` of the places that predict a response token, on every tensor-parallel rank.

        The gradient that flows back is summed over the vocabulary's ranks.
        """
        if self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(at.hidden, group=self.groups.tp)
        else:
            whole = copy_to_tensor_model_parallel_region(at.hidden, group=self.groups.tp)
        return whole.flatten(0, 1).index_select(0, microbatch.hidden_at)

    def measure(self, microbatch: Microbatch, at: AtHead, *, reference: ReferenceHead | None) -> TokenMeasures:
        """All measures at this rank's response positions, without gradient."""
        return measure_hidden(
            self.select(microbatch, at),
            at.weight,
            _labels(microbatch),
            shard=self.shard,
            temperature=self.temperature,
            reference=reference,
            entropy=True,
            chunk_tokens=self.chunk_tokens,
        )

    def loss(
        self,
        microbatch: Microbatch[TrainBatch],
        at: AtHead,
        *,
        loss: PolicyLoss,
        reference: ReferenceHead | None,
        report: Callable[[dict[str, Tensor]], None],
    ) -> Tensor:
        """What this rank adds to the update's loss, with gradient.

        Args:
            microbatch: of this rank.
            at: from the model.
            loss: of the update.
            reference: where the loss differentiates the full-vocabulary KL.
            report: takes detached sums that add up over microbatches and ranks.
        """
        if loss.separable is Separable.TOKENS:
            pieces = self._token_pieces(microbatch)
            of_piece = self._on_tokens
        else:
            pieces = self._row_pieces(microbatch)
            of_piece = self._on_rows

        def part(found: TokenMeasures, number: int) -> Tensor:
            value, sums = of_piece(microbatch, found, pieces[number], loss)
            report(sums)
            return value

        return fused_loss(
            self.select(microbatch, at),
            at.weight,
            _labels(microbatch),
            shard=self.shard,
            loss=part,
            chunks=[piece.tokens for piece in pieces],
            temperature=self.temperature,
            reference=reference,
            entropy=loss.needs_entropy,
        )

    # -- a loss that is a sum over tokens: cut anywhere, nothing to exchange ---------------------------------------

    def _token_pieces(self, microbatch: Microbatch) -> list["_Piece"]:
        count = microbatch.hidden_at.numel()
        size = self.chunk_tokens or max(count, 1)
        slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return [_Piece(tokens=piece, rows=slice(0, 0)) for piece in slices]

    def _on_tokens(
        self, microbatch: Microbatch[TrainBatch], found: TokenMeasures, piece: "_Piece", loss: PolicyLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = microbatch.rows.at(microbatch.target_at[piece.tokens])
        return loss(found.logprobs.unsqueeze(0), rows, full_kl=_one_row(found.full_kl), entropy=_one_row(found.entropy))

    # -- a loss that needs whole rows ------------------------------------------------------------------------------

    def _row_pieces(self, microbatch: Microbatch) -> list["_Piece"]:
        """Runs of rows whose response tokens fit a chunk; the same runs on every context-parallel rank."""
        size = self.chunk_tokens or int(microbatch.rows.response_mask.numel()) + 1
        width = microbatch.rows.response_mask.shape[1]
        here = torch.bincount(microbatch.target_at // width, minlength=microbatch.numbers.numel()).tolist()
        pieces, row, token = [], 0, 0
        for rows in _runs(microbatch.rows.response_mask.sum(-1).tolist(), size):
            tokens = sum(here[row : row + rows])
            pieces.append(_Piece(tokens=slice(token, token + tokens), rows=slice(row, row + rows)))
            row, token = row + rows, token + tokens
        return pieces

    def _on_rows(
        self, microbatch: Microbatch[TrainBatch], found: TokenMeasures, piece: "_Piece", loss: PolicyLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = microbatch.rows.rows(piece.rows)
        at = microbatch.target_at[piece.tokens] - piece.rows.start * rows.response_mask.shape[1]

        def whole(part: Tensor | None) -> Tensor | None:
            return None if part is None else self._whole_rows(part, at, rows.response_mask)

        logprobs = self._whole_rows(found.logprobs, at, rows.response_mask)
        value, sums = loss(logprobs, rows, full_kl=whole(found.full_kl), entropy=whole(found.entropy))
        # every context-parallel rank has the same value, and each the gradient of its own part
        once = 1.0 if self.groups.cp.rank() == 0 else 0.0
        return value - (1 - once) * value.detach(), {name: once * sum_ for name, sum_ in sums.items()}

    def _whole_rows(self, part: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        whole = torch.zeros(mask.numel(), dtype=part.dtype, device=part.device).index_put((at,), part)
        if self.groups.cp.size() > 1:
            whole = reduce_from_tensor_model_parallel_region(whole, group=self.groups.cp)
        return whole.view(mask.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Part of a microbatch that the loss is taken of at once: which of its tokens, which of its rows."""

    tokens: slice
    rows: slice


def _labels(microbatch: Microbatch) -> Tensor:
    return microbatch.rows.tokens[:, 1:].flatten()[microbatch.target_at]


def _one_row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.unsqueeze(0)


def _runs(lengths: Sequence[int], size: int) -> list[int]:
    """Number of rows in each run of consecutive rows with at most ``size`` tokens, one row at least."""
    runs: list[int] = []
    filled = size + 1
    for length in lengths:
        if filled + length > size:
            runs.append(1)
            filled = length
        else:
            runs[-1] += 1
            filled += length
    return runs
