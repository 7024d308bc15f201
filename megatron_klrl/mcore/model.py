"""A Megatron-Core GPTModel with the shape of a Hugging Face folder."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.config.rope import RopeKind
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.loss_scaling import CONFIG_FLAGS
from megatron_klrl.mcore.modules import CausalAttention, RMSNorm

_NO_FUSIONS = {
    # each needs a CUDA kernel or torch.compile with a C++ compiler
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
_PIPELINE = {
    "batch_p2p_comm": False,  # batched sends want a CUDA synchronise
    "batch_p2p_sync": False,
    "deallocate_pipeline_outputs": True,
}


_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.NONE: {},
    Recompute.ATTENTION: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    Recompute.FULL: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    shape: ModelShape,
    *,
    groups: ProcessGroups,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute = Recompute.NONE,
) -> TransformerConfig:
    """Megatron's configuration for a model shape in this layout."""
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.attention_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        virtual_pipeline_model_parallel_size=groups.virtual if groups.virtual > 1 else None,
        context_parallel_size=groups.cp.size(),
        expert_model_parallel_size=groups.ep.size(),
        expert_tensor_parallel_size=1,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        **CONFIG_FLAGS,
        **_NO_FUSIONS,
        **_PIPELINE,
        **_RECOMPUTE[recompute],
        **_mixture(shape),
    )


def _mixture(shape: ModelShape) -> dict[str, Any]:
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_ffn_hidden_size": shape.experts.ffn,
        "moe_router_topk": shape.experts.per_token,
        # softmax over the chosen experts alone is softmax over all, scaled to sum to 1
        "moe_router_pre_softmax": not shape.experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
        "moe_grouped_gemm": False,
    }


def build_model(
    shape: ModelShape, config: TransformerConfig, *, groups: ProcessGroups, max_sequence_length: int, chunk: int = 0
) -> GPTModel:
    """One chunk of this rank's part of the model, with Megatron's local layers and initial (not loaded) weights.

    Args:
        shape: of the whole model.
        config: from ``transformer_config``.
        groups: the layout; each stage holds ``groups.virtual`` chunks.
        max_sequence_length: of the position embedding.
        chunk: which of them.
    """
    stage = chunk if groups.virtual > 1 else None
    return GPTModel(
        config,
        _layer_spec(config, shape, stage),
        vocab_size=padded_vocab_size(shape.vocab_size, groups.tp.size()),
        max_sequence_length=max_sequence_length,
        pre_process=groups.is_first_stage and chunk == 0,
        post_process=groups.is_last_stage and chunk == groups.virtual - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=shape.rope.theta,  # type: ignore[arg-type]  annotated int, used as a float
        rope_scaling=shape.rope.kind is RopeKind.LLAMA3,
        rope_scaling_factor=shape.rope.factor,
        vp_stage=stage,
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Smallest vocabulary that every tensor-parallel rank holds an equal part of."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def unwrap(model: Any) -> GPTModel:
    """The GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _layer_spec(config: TransformerConfig, shape: ModelShape, stage: int | None) -> Any:
    layer: Any = get_gpt_layer_local_submodules(
        num_experts=shape.experts.count if shape.experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    layers = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
