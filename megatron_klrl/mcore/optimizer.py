"""Megatron's data parallelism and distributed optimizer around model chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_klrl.mcore import loss_scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Adam with a constant learning rate after a linear warm-up."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    warmup_steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows ``step`` updates."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


def trained(
    chunks: Sequence[Any], settings: OptimizerSettings, *, dtype: torch.dtype, device: torch.device
) -> tuple[list[Any], Any]:
    """Wrap model chunks for training.

    Args:
        chunks: of this rank, with their weights.
        settings: of Adam.
        dtype: of the parameters; gradients and moments are float32.
        device: of this rank.

    Returns:
        The wrapped chunks and the optimizer over all of them.
    """
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        # Clipping finds the norm, and the loop refuses one that is not finite on all ranks alike and in words.
        check_for_nan_in_grad=settings.clip_grad == 0,
        fp8_param_gather=config.fp8_param,
    )
    wrapped: list[Any] = [
        # only the first chunk's gradients are worth reducing early: the others' come in one go at the end
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            fp8_recipe=config.fp8_recipe if config.fp8_param else None,
            use_distributed_optimizer=True,
        ),
        wrapped,
        use_gloo_process_groups=device.type == "cuda",
    )
    config.finalize_model_grads_func = loss_scaling.finalize
    config.grad_scale_func = optimizer.scale_loss
    hooks = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped, optimizer
