"""Transformer Engine's per-tensor rounding to 8 bits, by torch's operations: its own kernels need a GPU.

What this stands in for is three kernels, and gloo's gathering of several tensors in one call, which takes all for the
type of the first. The tensors, the modules that own them, Megatron's buffers, optimizer and checkpoints are real.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = 448.0
"""Largest E4M3 number."""


def rounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers as bytes, and what they are to be multiplied with; the largest of the tensor becomes 448."""
    return _bytes(tensor, tensor.abs().max().float())


def _bytes(tensor: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    scale = LARGEST / largest
    return (tensor.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8), (1 / scale).reshape(1)


@contextmanager
def rounding_on_cpu() -> Iterator[None]:
    """Let Transformer Engine's tensors with current scaling be made and written on CPU; on a GPU they are anyway."""
    if torch.cuda.is_available():
        yield
        return
    import megatron.core.fp8_utils as of_megatron  # noqa: PLC0415  heavy
    from megatron.core.distributed import param_and_grad_buffer as buffers  # noqa: PLC0415
    from transformer_engine.pytorch import quantization  # noqa: PLC0415  not installed everywhere
    from transformer_engine.pytorch.tensor import float8_tensor, utils  # noqa: PLC0415

    quantizer = float8_tensor.Float8CurrentScalingQuantizer

    def make(self: Any, tensor: Tensor) -> object:
        data, scale_inv = rounded(tensor)
        return float8_tensor.Float8Tensor(
            shape=tensor.shape,
            dtype=tensor.dtype,
            data=data,
            fp8_scale_inv=scale_inv,
            fp8_dtype=self.dtype,
            quantizer=self,
            device=tensor.device,
        )

    def fill(_: Any, source: Tensor, target: Any, *, noop_flag: Tensor | None = None) -> object:
        assert noop_flag is None
        data, scale_inv = rounded(source)
        target._data.copy_(data)
        target._scale_inv.copy_(scale_inv)
        return target

    def cast(models: Any, masters: Any, starts: Any, group: Any, **_: Any) -> None:
        """As Transformer Engine does it: the largest number of all ranks' shards, then each rank its own bytes."""
        for model, master, start in zip(models, masters, starts, strict=True):
            largest = torch.zeros(()) if master is None else master.to(model.dtype).abs().max().float()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            if master is not None:
                data, _ = _bytes(master.to(model.dtype), largest)
                model._data.view(-1)[start : start + master.numel()].copy_(data)
            model._scale_inv.copy_(1 / (LARGEST / largest))

    with ExitStack() as stack:
        stack.enter_context(patch.object(quantizer, "quantize_impl", make))
        stack.enter_context(patch.object(quantizer, "update_quantized", fill))
        stack.enter_context(patch.object(utils, "cast_master_weights_to_fp8", cast))
        stack.enter_context(patch.object(of_megatron, "te_post_all_gather_processing", lambda _: None))
        stack.enter_context(patch.object(buffers, "_coalescing_manager", lambda *_, **__: nullcontext()))
        stack.enter_context(patch.object(quantization, "check_fp8_support", lambda: (True, "")))
        yield
