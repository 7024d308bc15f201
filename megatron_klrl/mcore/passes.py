"""Passes of a model over microbatches through Megatron's own schedule, and the gathering of what they return."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_klrl.mcore.groups import ProcessGroups


class Mode(StrEnum):
    """What a pass does after the forward."""

    FORWARD = "forward"
    TRAIN = "train"  # backward; each data-parallel rank ends with its share of the reduced gradient
    TRAIN_WHOLE_GRADIENT = "train_whole_gradient"  # backward; each ends with all of it


class Output(StrEnum):
    """What the last pipeline stage hands over."""

    LOGITS = "logits"  # [B, S, columns]: this rank's columns of the vocabulary
    HIDDEN = "hidden"  # [S, B, hidden]: what the output layer takes; small beside logits, so it can be kept


OnOutput = Callable[[Any, Tensor], Any]
"""``(rows, output) -> result`` on the last pipeline stage."""


def inputs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input ids ``[B, S]`` and positions ``[B, S]`` of rows ``[B, S + 1]``."""
    ids = tokens[:, :-1].contiguous()
    return ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def run(
    model: Any, microbatches: Sequence[Any], *, on_output: OnOutput, mode: Mode, output: Output = Output.LOGITS
) -> list[Any]:
    """Run every microbatch forward, and backward when training, over the pipeline.

    Args:
        model: a GPTModel or its DDP wrapper.
        microbatches: of equal shape (the pipeline exchanges tensors of one size).
        on_output: called on the last stage. When training it returns Megatron's three values (see loss_scaling).
        mode: whether to run backward, and what to leave of the gradient.
        output: what the last stage hands over.

    Returns:
        The results of ``on_output`` on the last stage, an empty list on the others.
    """
    rows, width = microbatches[0].tokens.shape
    options = {} if output is Output.LOGITS else {"output_processor": _hidden_states}

    def forward_step(stream: Any, stage: Any) -> tuple[Tensor, Callable]:
        microbatch = next(stream)
        ids, positions = inputs(microbatch.tokens)

        def loss(found: Tensor, **_: Any) -> Any:
            return on_output(microbatch, found)

        return stage(ids, positions, None, **options), loss

    def forward_backward() -> list[Any]:
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=width - 1,
            micro_batch_size=rows,
            forward_only=mode is Mode.FORWARD,
            collect_non_loss_data=mode is Mode.FORWARD,
            force_all_reduce=mode is Mode.TRAIN_WHOLE_GRADIENT,
        )

    with torch.set_grad_enabled(mode is not Mode.FORWARD):
        return forward_backward()


def _hidden_states(*, hidden_states: Tensor, **_: Any) -> Tensor:
    """Megatron's hook in place of the output layer."""
    return hidden_states


def share_from_last_stage(local: Tensor | None, size: Sequence[int], *, groups: ProcessGroups, device: Any) -> Tensor:
    """Give every pipeline stage the last stage's float32 tensor of the given size."""
    if groups.pp.size() == 1:
        assert local is not None
        return local
    tensor = local.contiguous() if local is not None else torch.empty(*size, dtype=torch.float32, device=device)
    dist.broadcast(tensor, src=groups.last_stage_rank, group=groups.pp)
    return tensor


def gather_rows(local: Tensor, *, groups: ProcessGroups) -> Tensor:
    """Concatenate every data-parallel rank's equal number of rows, in rank order."""
    if groups.dp.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(groups.dp.size())]
    dist.all_gather(parts, local.contiguous(), group=groups.dp)
    return torch.cat(parts)
