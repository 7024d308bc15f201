"""Megatron-Core: its weight swap from one layout into another, over gloo."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.refit import clear_all_caches, swap_model_weights

from benchmarks.harness.parity import Answer
from benchmarks.workloads.reshard import Reshard
from megatron_klrl.mcore import conversion, layers, model
from megatron_klrl.mcore.blocks import blocks
from megatron_klrl.mcore.layout import Join

Step = Callable[[], Answer]
_OWN = ("tp", "pp", "cp", "ep", "expt_tp", "mp", "tp_ep", "tp_ep_pp", "embd", "pos_embd", "tp_cp", "expt_dp")
_ALL = ("dp", "dp_cp", "tp_dp_cp")


def refit(work: Reshard, *, planned: bool = True) -> Step:
    """Into a Megatron model of one rank: its tensors are an engine's but for the order of queries, keys and values.

    So only those are copied on into the engine's order; the rest of the model lies in the engine's memory.
    """
    _stand_in_for_streams(work.device)
    source, target = _source(work), _whole_model(work)
    parameters = dict(target.named_parameters())
    joined = [parameter for parameter in work.parameters.values() if parameter.join is Join.QKV]
    for name in parameters.keys() - {parameter.name for parameter in joined}:
        parameters[name].data = work.engine[name]

    def step() -> Answer:
        if not planned:
            clear_all_caches()
        swap_model_weights(source, target, "gloo")
        for parameter in joined:
            for block in blocks(parameter, work.shape, rank=0, ranks=1):
                block.of_whole(work.targets[block.name]).copy_(block.of_part(parameters[parameter.name].detach()))
        return work.answer()

    return step


def _source(work: Reshard) -> GPTModel:
    config = model.transformer_config(work.shape, groups=work.groups, dtype=work.dtype, sequence_parallel=False)
    source = model.build_model(work.shape, config, groups=work.groups, max_sequence_length=128)
    for name, parameter in conversion.local_parameters([source], groups=work.groups):
        parameter.data = work.parts[name]
    return source


def _whole_model(work: Reshard) -> GPTModel:
    own: Any = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups: Any = ProcessGroupCollection()
    for name in _OWN:
        setattr(groups, name, own)
    for name in _ALL:
        setattr(groups, name, dist.group.WORLD)
    alone = replace(work.groups, tp=own, pp=own, cp=own, ep=own)
    config = model.transformer_config(work.shape, groups=alone, dtype=work.dtype, sequence_parallel=False)
    return GPTModel(
        config,
        layers.block(config, work.shape, layers=layers.Layers.LOCAL, stage=None),
        vocab_size=work.shape.vocab_size,
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )


def _stand_in_for_streams(device: torch.device) -> None:
    """Its gloo service makes streams even where there are none."""
    if device.type == "cuda":
        return
    cuda: Any = torch.cuda
    stream = cuda.current_stream()
    cuda.Stream = lambda *_, **__: stream
    cuda.stream = lambda _: nullcontext()
