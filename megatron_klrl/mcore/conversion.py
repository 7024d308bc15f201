"""Hugging Face folder in, Hugging Face tensors out."""

from collections.abc import Callable, Iterator
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
from megatron_klrl.mcore.groups import ProcessGroups


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


def local_parameters(model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their global names: layers count from the first stage, whatever stage holds them."""
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            yield f"decoder.layers.{int(number) + offset}.{rest}", parameter
        else:
            yield name, parameter


@torch.no_grad()
def load_hf(model: GPTModel, path: Path, *, shape: ModelShape, groups: ProcessGroups) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises:
        UserError: a tensor is missing or has another shape than config.json says.
    """
    folder = _Folder(path)
    by_name = {p.name: p for p in layout.parameters(shape)}
    for name, target in local_parameters(model):
        # the last stage of a tied model holds a copy of the embedding under the head's name
        source = by_name[layout.EMBEDDING if name == layout.HEAD and shape.tied else name]
        full = layout.join(source, [folder.read(hf) for hf in source.hf], shape)
        if tuple(full.shape) != layout.full_size(source, shape):
            expected = layout.full_size(source, shape)
            raise UserError(
                f"{path}: {' + '.join(source.hf)} is {tuple(full.shape)}, config.json says {expected}",
                field="model.path",
                fix="use the config.json that belongs to these weights",
            )
        target.copy_(layout.cut(source, full, groups.tp.rank(), groups.tp.size()))


@torch.no_grad()
def export_hf(
    model: GPTModel,
    *,
    shape: ModelShape,
    groups: ProcessGroups,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
) -> Iterator[tuple[str, Tensor]]:
    """Stream the whole model under Hugging Face names, one full parameter at a time, to every rank.

    Collective: every rank of the model must consume the iterator to its end, in step with the others.

    Args:
        model: this rank's part.
        shape: of the whole model.
        groups: the layout.
        value: what to export of a parameter; its gradient, for example.
    """
    mine = dict(local_parameters(model))
    device = next(iter(mine.values())).device
    for parameter in layout.parameters(shape):
        owner = _owner(parameter, shape, groups)
        if groups.pp.rank() == owner:
            full = layout.uncut(parameter, _all_gather(value(mine[parameter.name]), groups.tp), shape).contiguous()
        else:
            dtype = value(next(iter(mine.values()))).dtype
            full = torch.empty(layout.full_size(parameter, shape), dtype=dtype, device=device)
        if groups.pp.size() > 1:
            dist.broadcast(full, src=dist.get_global_rank(groups.pp, owner), group=groups.pp)
        yield from zip(parameter.hf, layout.split(parameter, full, shape), strict=True)


def _owner(parameter: layout.Parameter, shape: ModelShape, groups: ProcessGroups) -> int:
    """Pipeline stage that holds a parameter; layers are divided evenly (checked in config/validate.py)."""
    if parameter.layer is not None:
        return parameter.layer // (shape.layers // groups.pp.size())
    return 0 if parameter.name == layout.EMBEDDING else groups.pp.size() - 1


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return parts
