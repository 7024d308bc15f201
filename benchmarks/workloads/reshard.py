"""A model's weights in Megatron's layout, and the fused tensors of an engine that holds all of it."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from benchmarks.harness.parity import Answer
from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.rope import Rope
from megatron_klrl.mcore import groups as process_groups
from megatron_klrl.mcore import layout
from megatron_klrl.mcore.blocks import blocks
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.runtime.world import World
from megatron_klrl.weight_sync.plan import Block

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SEED = 11


class Reshard:
    """Seeded weights: this rank's parts by Megatron's names, and where an engine of one rank wants them.

    An engine joins queries, keys and values, and gate and up, each into one tensor; everything else it holds as Hugging
    Face does.

    Attributes:
        shape: of the model.
        groups: Megatron's, over all ranks.
        parts: this rank's parameters by global name.
        flat: the engine's memory, allocated once.
        engine: its tensors by Megatron's names for them.
        targets: Hugging Face's tensors as views of them.
    """

    def __init__(
        self,
        *,
        hidden: int,
        layers: int,
        ffn: int,
        vocab: int,
        dtype: str,
        tensor: int = 1,
        pipeline: int = 1,
        device: str = "cpu",
    ) -> None:
        """Make the parts; collective. Heads of 64, four query heads to a key-value head."""
        self.shape = _shape(hidden=hidden, layers=layers, ffn=ffn, vocab=vocab)
        self.dtype, self.device = _DTYPES[dtype], torch.device(device)
        self.groups = self._join(process_groups.Layout(tensor=tensor, pipeline=pipeline))
        self.parameters = {parameter.name: parameter for parameter in layout.parameters(self.shape)}
        self.parts = {name: self._part(self.parameters[name]) for name in self._mine()}
        self.flat, self.engine, self.targets = self._empty_engine()

    def blocks(self, name: str) -> list[Block]:
        """Of this rank's part of a parameter."""
        return list(blocks(self.parameters[name], self.shape, rank=self.groups.tp.rank(), ranks=self.groups.tp.size()))

    def restore(self) -> None:
        """Blank what was written, so that nobody's answer is the last one's, and let all ranks begin together."""
        self.flat.zero_()
        dist.barrier()

    def truth(self) -> Answer:
        """Straight from the seeds."""
        _, engine, targets = self._empty_engine()
        for parameter in self.parameters.values():
            for name, tensor in self._wholes(parameter).items():
                targets[name].copy_(tensor)
        return Answer(values=engine)

    def answer(self) -> Answer:
        """What stands in the engine's tensors."""
        return Answer(values=self.engine)

    def size(self) -> Mapping[str, float]:
        """Every rank's engine must be read from somewhere and written."""
        count = self.flat.numel() * self.dtype.itemsize
        return {"input_bytes": count, "least_bytes": 2 * count * dist.get_world_size(), "least_flops": 0}

    def _join(self, wanted: process_groups.Layout) -> process_groups.ProcessGroups:
        run_on_cpu()
        if parallel_state.model_parallel_is_initialized():
            process_groups.destroy()  # of the case before, in a process that lives through several
        rank, size = dist.get_rank(), dist.get_world_size()
        world = World(rank=rank, size=size, local_rank=rank, device=self.device, one_machine=True)
        return process_groups.initialize(world, wanted, seed=0)

    def _mine(self) -> Iterator[str]:
        """Names of what lies on this rank's stage."""
        per_stage, stage = self.shape.layers // self.groups.pp.size(), self.groups.pp.rank()
        for name, parameter in self.parameters.items():
            first = name == layout.EMBEDDING and self.groups.is_first_stage
            last = name in (layout.FINAL_NORM, layout.HEAD) and self.groups.is_last_stage
            if first or last or (parameter.layer is not None and parameter.layer // per_stage == stage):
                yield name

    def _part(self, parameter: layout.Parameter) -> Tensor:
        wholes, found = self._wholes(parameter), self.blocks(parameter.name)
        part = torch.zeros(prod(found[0].part_view), dtype=self.dtype, device=self.device)
        for block in found:
            block.of_part(part).copy_(block.of_whole(wholes[block.name]))
        if len(found) == 1:
            return part.view(found[0].part_view)
        return part.view(-1, *layout.hf_sizes(parameter, self.shape)[0][1:])  # joined tensors lie below each other

    def _wholes(self, parameter: layout.Parameter) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(_SEED + list(self.parameters).index(parameter.name))
        return {
            name: torch.empty(size, dtype=self.dtype, device=self.device).uniform_(-1, 1, generator=generator)
            for name, size in zip(parameter.hf, layout.hf_sizes(parameter, self.shape), strict=True)
        }

    def _empty_engine(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        engine: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        flat = torch.zeros(self.shape.parameters, dtype=self.dtype, device=self.device)
        start = 0
        for parameter in self.parameters.values():
            sizes = layout.hf_sizes(parameter, self.shape)
            rows, tail = [size[0] for size in sizes], sizes[0][1:]
            end = start + sum(rows) * prod(tail)
            engine[parameter.name] = flat[start:end].view(-1, *tail)
            targets |= zip(parameter.hf, engine[parameter.name].split(rows), strict=True)
            start = end
        return flat, engine, targets


def _shape(*, hidden: int, layers: int, ffn: int, vocab: int) -> ModelShape:
    heads = hidden // 64
    return ModelShape(
        path=Path("none"),
        architecture="Qwen2ForCausalLM",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads // 4,
        head_dim=64,
        ffn=ffn,
        vocab_size=vocab,
        tied=False,
        attention_bias=True,
        qk_norm=False,
        rope=Rope(theta=10_000.0),
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        eos_ids=(1,),
    )
