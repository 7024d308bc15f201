"""A Megatron-Core GPTModel with the shape of a Hugging Face folder."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.config.rope import RopeKind
from megatron_klrl.mcore import layers as modules
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.loss_scaling import CONFIG_FLAGS
from megatron_klrl.mcore.precision import Products

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
    layers: Layers = Layers.LOCAL,
    products: Products | None = None,
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
        **modules.flags(layers),
        **(products or Products()).flags(),
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
    shape: ModelShape,
    config: TransformerConfig,
    *,
    groups: ProcessGroups,
    max_sequence_length: int,
    layers: Layers = Layers.LOCAL,
    chunk: int = 0,
) -> GPTModel:
    """One chunk of this rank's part of the model, with initial (not loaded) weights.

    Args:
        shape: of the whole model.
        config: from ``transformer_config``.
        groups: the layout; each stage holds ``groups.virtual`` chunks.
        max_sequence_length: of the position embedding.
        layers: kind of modules, that of ``config``.
        chunk: which of them.
    """
    stage = chunk if groups.virtual > 1 else None
    return GPTModel(
        config,
        modules.block(config, shape, layers=layers, stage=stage),
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
