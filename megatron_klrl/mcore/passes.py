"""Passes of a model over microbatches through Megatron's own schedules, and the gathering of what they return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_klrl.mcore import loss_scaling
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.microbatches import Microbatch


class Mode(StrEnum):
    """What a pass does after the forward."""

    FORWARD = "forward"
    TRAIN = "train"  # backward; each data-parallel rank ends with its share of the reduced gradient
    TRAIN_WHOLE_GRADIENT = "train_whole_gradient"  # backward; each ends with all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHead:
    """What the last pipeline stage hands over for one microbatch, in place of logits.

    Attributes:
        hidden: final hidden states in Megatron's order, ``[s, b, hidden]``, as the output layer takes them.
        weight: this rank's columns of the output layer, ``[columns, hidden]``.
    """

    hidden: Tensor
    weight: Tensor


OnHead = Callable[[Microbatch, AtHead], Tensor]
"""On the last stage: a tensor to collect when going forward, the loss of the microbatch when training."""


def run(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], *, on_head: OnHead, mode: Mode, groups: ProcessGroups
) -> list[Tensor]:
    """Run every microbatch forward, and backward when training, over the pipeline.

    Args:
        chunks: this rank's model chunks, DDP-wrapped when training.
        microbatches: of equal shape (the pipeline exchanges tensors of one size).
        on_head: called on the last stage.
        mode: whether to run backward, and what to leave of the gradient.
        groups: the layout.

    Returns:
        What ``on_head`` returned on the last stage, detached when training; an empty list on the others.
    """
    first = microbatches[0]

    def forward_step(stream: Any, chunk: Any) -> tuple[Tensor, Callable]:
        microbatch = next(stream)
        out = chunk(
            microbatch.input_ids,
            microbatch.position_ids,
            None,
            packed_seq_params=microbatch.packed,
            output_processor=_at_head,
            output_processor_context=(on_head, microbatch),
        )
        return out, _forward_result if mode is Mode.FORWARD else _loss_result

    with torch.set_grad_enabled(mode is not Mode.FORWARD):
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=first.sequence_length * groups.cp.size(),
            micro_batch_size=first.input_ids.shape[0],
            forward_only=mode is Mode.FORWARD,
            collect_non_loss_data=mode is Mode.FORWARD,
            force_all_reduce=mode is Mode.TRAIN_WHOLE_GRADIENT,
        )
    return found if mode is Mode.FORWARD else [report["loss"] for report in found]


def _at_head(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Any, **_: Any) -> Any:
    """Megatron's hook in place of the output layer; ``output_weight`` is the embedding of a tied model."""
    on_head, microbatch = context
    weight = output_layer.weight if output_weight is None else output_weight
    return on_head(microbatch, AtHead(hidden=hidden_states, weight=weight))


def _forward_result(found: Tensor, **_: Any) -> Tensor:
    return found


def _loss_result(loss: Tensor, **_: Any) -> Any:
    return loss_scaling.complete(loss, {"loss": loss.detach()})


def add_over_ranks(local: Tensor, *, groups: ProcessGroups) -> Tensor:
    """Sum of what the last stages of all data- and context-parallel ranks hold, on every rank and stage.

    Args:
        local: this rank's part; on other stages a tensor of the same size, whose content does not matter.
        groups: the layout.
    """
    if groups.is_last_stage:
        dist.all_reduce(local, group=groups.dp_cp)
    if groups.pp.size() > 1:
        dist.broadcast(local, src=groups.last_stage_rank, group=groups.pp)
    return local
