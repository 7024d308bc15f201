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
        cp: ranks that share the sequence of each row.
        ep: ranks that share the experts of each layer; they hold different rows.
        dp: ranks that hold the same shard and different rows.
        dp_cp: ``dp`` with context parallelism: the ranks that gradients are summed over.
        virtual: model chunks of each pipeline stage (interleaved schedule); 1 is the plain schedule.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    virtual: int

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is cut; data parallelism is what is left of the world.

    Attributes:
        tensor: ranks each weight matrix is split over.
        pipeline: stages the layers are split into.
        context: ranks each sequence is split over.
        expert: ranks the experts are split over; they lie inside data and context parallelism.
        virtual: model chunks of each stage, which the interleaved schedule takes in turn.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    virtual: int = 1


def initialize(world: World, layout: Layout, *, seed: int) -> ProcessGroups:
    """Cut the world into Megatron's groups and seed its per-rank generators.

    Args:
        world: the joined world; ``world.size`` must be a multiple of ``tensor * pipeline * context``.
        layout: the cut.
        seed: base of Megatron's random streams (dropout; initialisation when no weights are loaded).
    """
    # gloo twins of every group serve CPU offloading of NCCL jobs; with gloo as backend they are copies
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,  # experts are small: whole on a rank, spread over ranks
        create_gloo_process_groups=world.device.type == "cuda",
    )
    seed_streams(seed)
    state: Any = parallel_state  # its getters are typed as optional; after initialisation they are not
    return ProcessGroups(
        tp=state.get_tensor_model_parallel_group(),
        pp=state.get_pipeline_model_parallel_group(),
        cp=state.get_context_parallel_group(),
        ep=state.get_expert_model_parallel_group(),
        dp=state.get_data_parallel_group(),
        dp_cp=state.get_data_parallel_group(with_context_parallel=True),
        virtual=layout.virtual,
    )


def seed_streams(seed: int) -> None:
    """Start Megatron's random streams anew, as after ``initialize`` with this seed."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Forget Megatron's groups. Call before the default group goes, or gloo's threads may abort the exit."""
    parallel_state.destroy_model_parallel()
