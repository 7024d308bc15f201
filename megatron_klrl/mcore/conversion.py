"""Hugging Face folder in, Hugging Face tensors out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.errors import UserError
from megatron_klrl.mcore import layout
from megatron_klrl.mcore.blocks import blocks
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.quantised import Values, numbers, to_write, written
from megatron_klrl.weight_sync.plan import Bucket, Share, Whole, buckets


class _Folder:
    """The tensors of a Hugging Face folder by name, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self._where.update(dict.fromkeys(tensors.keys(), file))

    def read(self, name: str) -> Tensor:
        if name not in self._where:
            raise UserError(
                f"{self.path} has no tensor {name!r}",
                field="model.path",
                fix="its weights do not match its config.json; export the model again",
            )
        with safe_open(self._where[name], "pt") as tensors:
            return tensors.get_tensor(name)


def local_parameters(chunks: Sequence[GPTModel], *, groups: ProcessGroups) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their global names: layers and experts count over the whole model."""
    for number, chunk in enumerate(chunks):
        offset = get_transformer_layer_offset(chunk.config, number if groups.virtual > 1 else None)
        experts = (chunk.config.num_moe_experts or 0) // groups.ep.size() * groups.ep.rank()
        for name, parameter in chunk.named_parameters():
            shifted = _shifted(_shifted(name, "decoder.layers.", offset), ".local_experts.", experts)
            yield layout.general(shifted), parameter


def _shifted(name: str, before: str, offset: int) -> str:
    """A name with ``offset`` added to the number that follows ``before``, where there is one."""
    head, found, tail = name.partition(before)
    if not found:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}{before}{int(number) + offset}.{rest}"


@torch.no_grad()
def load_hf(chunks: Sequence[GPTModel], path: Path, *, shape: ModelShape, groups: ProcessGroups) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises:
        UserError: a tensor is missing or has another shape than config.json says.
    """
    folder = _Folder(path)
    by_name = {p.name: p for p in layout.parameters(shape)}
    for name, target in local_parameters(chunks, groups=groups):
        # the last stage of a tied model holds a copy of the embedding under the head's name
        source = by_name[layout.EMBEDDING if name == layout.HEAD and shape.tied else name]
        read = {hf: folder.read(hf) for hf in source.hf}
        for hf, size in zip(source.hf, layout.hf_sizes(source, shape), strict=True):
            if tuple(read[hf].shape) != size:
                raise UserError(
                    f"{path}: {hf} is {tuple(read[hf].shape)}, config.json says {size}",
                    field="model.path",
                    fix="use the config.json that belongs to these weights",
                )
        fill(target, source, read, shape=shape, groups=groups)


@torch.no_grad()
def fill(
    target: torch.nn.Parameter,
    source: layout.Parameter,
    tensors: Mapping[str, Tensor],
    *,
    shape: ModelShape,
    groups: ProcessGroups,
) -> None:
    """Copy this rank's part of a parameter out of whole Hugging Face tensors; padding of the vocabulary is zero."""
    new = to_write(target)
    if source.cut is layout.Cut.VOCAB_ROWS:
        new.zero_()
    for block in blocks(source, shape, rank=groups.tp.rank(), ranks=groups.tp.size()):
        block.of_part(new).copy_(block.of_whole(tensors[block.name]))
    written(target, new)


def parts_by_name(
    chunks: Sequence[GPTModel],
    *,
    groups: ProcessGroups,
    value: Callable[[torch.nn.Parameter], Tensor] = numbers,
) -> Mapping[str, Tensor]:
    """This rank's parts under their global names, each taken when it is looked up.

    Args:
        chunks: this rank's part of the model.
        groups: the layout.
        value: what to take of a parameter: the numbers it stands for, or its gradient, for example.
    """
    return Values(dict(local_parameters(chunks, groups=groups)), value=value)


def plan(
    shape: ModelShape, *, groups: ProcessGroups, exchange: dist.ProcessGroup, max_numel: int
) -> tuple[Bucket, ...]:
    """Where every Hugging Face tensor comes from in this layout; collective, made once.

    Args:
        shape: of the whole model.
        groups: the layout.
        exchange: ranks that together hold the model, once or several times over.
        max_numel: most elements of a bucket.
    """
    mine = (groups.pp.rank(), groups.tp.rank(), groups.ep.rank())
    places: list[tuple[int, int, int]] = [mine] * exchange.size()
    dist.all_gather_object(places, mine, group=exchange)
    # where several ranks hold the same, the first of them gives it
    holders = {place: number for number, place in reversed(list(enumerate(places)))}
    tensors = (
        tensor for parameter in layout.parameters(shape) for tensor in _wholes(parameter, shape, groups, holders)
    )
    return buckets(tensors, max_numel=max_numel)


def _wholes(
    parameter: layout.Parameter, shape: ModelShape, groups: ProcessGroups, holders: Mapping[tuple[int, int, int], int]
) -> Iterator[Whole]:
    stage, expert_rank = _stage(parameter, shape, groups), _expert_rank(parameter, shape, groups)
    ranks = 1 if parameter.cut is layout.Cut.WHOLE else groups.tp.size()
    shares: dict[str, list[Share]] = {name: [] for name in parameter.hf}
    for rank in range(ranks):
        holder = _holder(holders, stage=stage, tensor_rank=rank, expert_rank=expert_rank, parameter=parameter)
        for block in blocks(parameter, shape, rank=rank, ranks=ranks):
            shares[block.name].append(Share(holder=holder, part=parameter.name, block=block))
    # all experts of a layer are one module of an engine
    module = parameter.name if parameter.expert is None else f"decoder.layers.{parameter.layer}.mlp.experts"
    for name, size in zip(parameter.hf, layout.hf_sizes(parameter, shape), strict=True):
        yield Whole(name=name, size=size, module=module, shares=tuple(shares[name]))


def _holder(
    holders: Mapping[tuple[int, int, int], int],
    *,
    stage: int,
    tensor_rank: int,
    expert_rank: int,
    parameter: layout.Parameter,
) -> int:
    """First rank of that stage with that part; what is no expert lies on every expert rank, an expert on any of tp."""
    for (pp, tp, ep), number in sorted(holders.items(), key=lambda item: item[1]):
        right_part = ep == expert_rank if parameter.expert is not None else tp == tensor_rank
        if pp == stage and right_part:
            return number
    raise ValueError(f"no rank of the group holds {parameter.name}")


def _stage(parameter: layout.Parameter, shape: ModelShape, groups: ProcessGroups) -> int:
    """Pipeline stage that holds a parameter; layers are divided evenly (checked in config/validate.py).

    Chunks take layers in turn: with two stages of two chunks, layers 0-1 lie on stage 0, 2-3 on 1, 4-5 on 0 again.
    """
    if parameter.layer is not None:
        return parameter.layer // (shape.layers // (groups.pp.size() * groups.virtual)) % groups.pp.size()
    return 0 if parameter.name == layout.EMBEDDING else groups.pp.size() - 1


def _expert_rank(parameter: layout.Parameter, shape: ModelShape, groups: ProcessGroups) -> int:
    """Rank of the expert-parallel group that holds a parameter; 0 outside experts."""
    if parameter.expert is None or shape.experts is None:
        return 0
    return parameter.expert // (shape.experts.count // groups.ep.size())
