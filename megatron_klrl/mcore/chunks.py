"""A rank's part of a model, with weights and without anything that trains it."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.mcore import conversion
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.layers import Layers, choose
from megatron_klrl.mcore.model import build_model, transformer_config
from megatron_klrl.mcore.precision import Products


def plain_chunks(  # noqa: PLR0913  what TransformerConfig takes
    shape: ModelShape,
    folder: Path,
    *,
    groups: ProcessGroups,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: Recompute = Recompute.NONE,
    layers: Layers | None = None,
    products: Products | None = None,
) -> list[Any]:
    """This rank's part of a model with the weights of a Hugging Face folder; no gradients are reduced or applied."""
    products = products or Products()
    layers = layers or choose(device, fp8=products.fp8)
    config = transformer_config(
        shape,
        groups=groups,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        layers=layers,
        products=products,
    )
    positions = shape.max_position_embeddings
    built = [
        build_model(shape, config, groups=groups, max_sequence_length=positions, layers=layers, chunk=chunk).to(device)
        for chunk in range(groups.virtual)
    ]
    conversion.load_hf(built, folder, shape=shape, groups=groups)
    return [Float16Module(config, chunk) for chunk in built] if dtype == torch.bfloat16 else built
