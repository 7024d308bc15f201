"""What the layers of a model are built of: chosen here, and nowhere else.

Both kinds have the same function, the same checkpoint and the same Hugging Face tensors. Transformer Engine puts the
norm in front of a projection into one module with it, so that two parameters of a layer have another name there
(``layout.general``); in checkpoints Megatron's local layers already go by Transformer Engine's names.
"""

from enum import StrEnum
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Fp8
from megatron_klrl.errors import UserError
from megatron_klrl.mcore.modules import CausalAttention, RMSNorm

_NORM_BEFORE_EXPERTS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Where experts follow, Transformer Engine has a norm of its own; in checkpoints it goes by the local layers' name."""


class Layers(StrEnum):
    """Kinds of modules."""

    LOCAL = "local"  # Megatron's own, and the two of modules.py: run anywhere
    FUSED = "fused"  # Transformer Engine's: run on CUDA alone


def choose(device: torch.device, *, fp8: Fp8) -> Layers:
    """Transformer Engine where it is installed and can run.

    Args:
        device: of the model.
        fp8: of its products, which only Transformer Engine takes.

    Raises:
        UserError: 8-bit products without Transformer Engine.
    """
    if device.type == "cuda" and HAVE_TE:
        return Layers.FUSED
    if fp8 is not Fp8.NONE:
        problem = f"is {fp8}, but Transformer Engine is not installed" if device.type == "cuda" else "needs a GPU"
        raise UserError(problem, field="precision.fp8", fix="see docs/guide/gpu-setup.md, or set precision.fp8=none")
    return Layers.LOCAL


def flags(layers: Layers) -> dict[str, Any]:
    """Of Megatron's TransformerConfig: what is done in one kernel."""
    fused = layers is Layers.FUSED
    return {
        "transformer_impl": "transformer_engine" if fused else "local",
        "bias_activation_fusion": fused,  # the local path would need a C++ compiler at the first step
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": False,  # needs Apex, or main gradients that Transformer Engine writes to
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }


def block(config: TransformerConfig, shape: ModelShape, *, layers: Layers, stage: int | None) -> Any:
    """Specification of one chunk's layers.

    Args:
        config: of the model.
        shape: of the model.
        layers: kind of modules.
        stage: number of the chunk in an interleaved pipeline; None in a plain one.
    """
    experts = shape.experts.count if shape.experts else None
    if layers is Layers.FUSED:
        layer, norm = _fused(config, experts)
    else:
        layer, norm = _local(config, experts)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    count = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm)


def _local(config: TransformerConfig, experts: int | None) -> tuple[Any, Any]:
    layer: Any = get_gpt_layer_local_submodules(
        num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _fused(config: TransformerConfig, experts: int | None) -> tuple[Any, Any]:
    from megatron.core.extensions.transformer_engine import TENorm  # noqa: PLC0415  exists with Transformer Engine alone

    layer: Any = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
    )
    if experts is not None:
        layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **_NORM_BEFORE_EXPERTS}
    return layer, TENorm
