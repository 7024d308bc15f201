"""What trainers without a plan do: every parameter gathered over its tensor-parallel ranks, then sent to all stages."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.reshard import Reshard
from megatron_klrl.mcore.blocks import blocks
from megatron_klrl.mcore.layout import Cut, Parameter

Step = Callable[[], Answer]


def refit(work: Reshard) -> Step:
    """One all-gather and one broadcast a parameter; who holds what is known beforehand."""
    tp, pp = work.groups.tp, work.groups.pp
    mine: list[list[str]] = [[] for _ in range(pp.size())]
    dist.all_gather_object(mine, list(work.parts), group=pp)
    stages = {name: stage for stage, names in enumerate(mine) for name in names}

    def step() -> Answer:
        for name, parameter in work.parameters.items():
            ranks = 1 if parameter.cut is Cut.WHOLE else tp.size()
            gathered = _gathered(work, parameter, ranks, stage=stages[name])
            for rank in range(ranks):
                for block in blocks(parameter, work.shape, rank=rank, ranks=ranks):
                    block.of_whole(work.targets[block.name]).copy_(block.of_part(gathered[rank]))
        return work.answer()

    return step


def _gathered(work: Reshard, parameter: Parameter, ranks: int, *, stage: int) -> Tensor:
    """``[ranks, elements of a part]``."""
    tp, pp = work.groups.tp, work.groups.pp
    part = work.parts.get(parameter.name)
    numel = sum(work.targets[name].numel() for name in parameter.hf) // ranks
    found = torch.empty(ranks, numel, dtype=work.dtype, device=work.device)
    if part is not None:
        if ranks == 1:
            found[0].copy_(part.view(-1))
        else:
            dist.all_gather_into_tensor(found.view(-1), part.view(-1), group=tp)
    if pp.size() > 1:
        dist.broadcast(found, src=dist.get_global_rank(pp, stage), group=pp)
    return found
