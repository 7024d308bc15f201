"""The two modules that Megatron's local (CPU) layers lack, given to it through layer specs."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm that works under sequence parallelism.

    Megatron's ``WrappedTorchNorm`` refuses sequence parallelism, where each rank normalises its own part of the
    sequence and the weight's gradient is the sum over the tensor-parallel ranks; marking the weight is all that takes.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  read by finalize_model_grads

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class CausalAttention(nn.Module):
    """Core attention over torch's scaled_dot_product_attention: causal, grouped query heads, padded or packed rows.

    Rows are padded on the right, and so is each row inside a pack: causality alone keeps padding out of every real
    position. Under context parallelism each rank holds two chunks of every row, one from its front and one from its
    back (Megatron's order), and gathers the keys and values of the others; the backward sums their gradients.
    """

    def __init__(
        self, config: TransformerConfig, *, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__()
        self.config, self.softmax_scale = config, softmax_scale
        self._cp = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[S, B, heads, head_dim]``, or ``[T, heads, head_dim]`` of packed rows.
            key: the same with ``kv_heads``.
            value: the same with ``kv_heads``.
            attention_mask: must be None.
            packed_seq_params: where packed rows begin and end.

        Returns:
            ``[S, B, heads * head_dim]``, or ``[T, heads * head_dim]``.
        """
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no mask: rows are padded on the right")
        packed = query.dim() == 3
        if packed:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        ranks = self._cp.size() if self._cp is not None else 1
        lengths = [query.shape[0]] if packed_seq_params is None else _local_lengths(packed_seq_params, ranks)
        parts = zip(query.split(lengths), self._whole_rows(key, lengths), self._whole_rows(value, lengths), strict=True)
        out = torch.cat([self._row(*part) for part in parts]).flatten(2)
        return out.squeeze(1) if packed else out

    def _whole_rows(self, local: Tensor, lengths: list[int]) -> list[Tensor]:
        """Each row's keys or values from all context-parallel ranks, in the order of the row."""
        if self._cp is None:
            return list(local.split(lengths))
        # gradient: reduce-scatter, the sum over the ranks that used a key
        ranks = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self._cp)
        by_row = zip(*(rank.split(lengths) for rank in ranks.chunk(self._cp.size())), strict=True)
        halves = ([part.chunk(2) for part in row] for row in by_row)
        return [torch.cat([h[0] for h in row] + [h[1] for h in reversed(row)]) for row in halves]

    def _row(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._cp is None:
            return self._attend(query, key, value, mask=None)
        chunk = query.shape[0] // 2
        places = (self._cp.rank(), 2 * self._cp.size() - 1 - self._cp.rank())
        halves = []
        for place, half in zip(places, query.chunk(2), strict=True):
            seen = (place + 1) * chunk
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=query.device).tril(place * chunk)
            halves.append(self._attend(half, key[:seen], value[:seen], mask=mask))
        return torch.cat(halves)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.permute(2, 0, 1, 3)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """No state to checkpoint."""
        del prefix, sharded_offsets, metadata
        return {}


def _local_lengths(packed: PackedSeqParams, ranks: int) -> list[int]:
    edges = packed.cu_seqlens_q
    return ((edges[1:] - edges[:-1]) // ranks).tolist()
