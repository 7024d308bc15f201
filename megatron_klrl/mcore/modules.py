"""The two modules that Megatron's local (CPU) layers lack, given to it through layer specs."""

from typing import Any

import torch
import torch.nn.functional as F
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
    """Core attention over torch's scaled_dot_product_attention: causal, grouped query heads, no materialised mask.

    Rows are padded on the right, so causality alone keeps padding out of every real position.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.config, self.softmax_scale = config, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend.

        Args:
            query: ``[S, B, heads, head_dim]``.
            key: ``[S, B, kv_heads, head_dim]``.
            value: ``[S, B, kv_heads, head_dim]``.
            attention_mask: must be None.

        Returns:
            ``[S, B, heads * head_dim]``.
        """
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no mask: rows are padded on the right")
        length, rows, heads, head_dim = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.shape[1] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(length, rows, heads * head_dim)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """No state to checkpoint."""
        del prefix, sharded_offsets, metadata
        return {}
