"""Megatron's loss scaling, cancelled in one place.

Our loss arrives complete: each microbatch contributes its share of a loss whose denominators count the whole batch, so
the gradient wanted is the plain sum over microbatches and data-parallel ranks. Between a loss function and the
optimizer Megatron-Core 0.19 has four places that rescale; this is what each does here:

1. ``schedules.forward_step_calc_loss`` divides by the token count and by the number of microbatches, unless
   ``calculate_per_token_loss`` is set and the loss function returns three values. Both hold: nothing happens.
2. ``DistributedDataParallel`` scales by 1 / (dp * cp), unless ``calculate_per_token_loss``: nothing happens, it sums.
3. ``finalize_model_grads`` divides by the all-reduced token count, when it is given one. ``finalize`` gives it none.
4. ``grad_scale_func`` multiplies the loss by the fp16 loss scale, which the optimizer undoes. We train in bf16 or fp32,
   where it is 1.
"""

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

CONFIG_FLAGS = {"calculate_per_token_loss": True}
"""The TransformerConfig flags that steps 1 and 2 above rest on."""


def complete(loss: Tensor, report: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The three values of Megatron's loss function for a loss that already has its global denominators."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def finalize(model: list[Any], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """``finalize_model_grads`` without its division by tokens; the schedule passes their count, which is ignored."""
    del num_tokens
    finalize_model_grads(model, None, **groups)
