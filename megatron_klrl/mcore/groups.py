"""Megatron's parallel state, read once into explicit handles."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_klrl.runtime.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroups:
    """The groups this rank belongs to.

    Attributes:
        tp: ranks that share each layer's tensors.
        pp: ranks that hold consecutive layers.
        dp: ranks that hold the same shard and different rows.
        dp_cp: ``dp`` with context parallelism: the ranks that gradients are summed over.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)


def initialize(world: World, *, tensor: int, pipeline: int, seed: int) -> ProcessGroups:
    """Cut the world into Megatron's groups and seed its per-rank generators.

    Args:
        world: the joined world; ``world.size`` must be a multiple of ``tensor * pipeline``.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        seed: base of Megatron's random streams (dropout; initialisation when no weights are loaded).
    """
    # gloo twins of every group serve CPU offloading of NCCL jobs; with gloo as backend they are copies
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=world.device.type == "cuda",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    state: Any = parallel_state  # its getters are typed as optional; after initialisation they are not
    return ProcessGroups(
        tp=state.get_tensor_model_parallel_group(),
        pp=state.get_pipeline_model_parallel_group(),
        dp=state.get_data_parallel_group(),
        dp_cp=state.get_data_parallel_group(with_context_parallel=True),
    )


def destroy() -> None:
    """Forget Megatron's groups. Call before the default group goes, or gloo's threads may abort the exit."""
    parallel_state.destroy_model_parallel()
