"""Which Hugging Face tensors make each Megatron parameter, and how it is cut over the tensor-parallel ranks.

Names and sizes alone; blocks.py says what lies where. Covers Llama, Qwen2, Qwen3 and Qwen3 with experts.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_klrl.config.model_folder import ModelShape


class Cut(StrEnum):
    """How a full parameter is divided over the tensor-parallel ranks."""

    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    GATED_ROWS = "gated_rows"  # each rank holds [its rows of gate; its rows of up]
    VOCAB_ROWS = "vocab_rows"  # rows, after padding to a multiple of the ranks


class Join(StrEnum):
    """How Hugging Face tensors combine into one parameter."""

    SAME = "same"
    QKV = "qkv"  # per key-value group: its query heads, its key head, its value head
    GATE_UP = "gate_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: Megatron's name, with the global layer number.
        hf: the Hugging Face tensors it holds, in order.
        cut: over tensor-parallel ranks.
        join: from Hugging Face tensors.
        layer: global layer number, or None for embedding (first stage) and head or final norm (last stage).
        expert: global number of the expert it belongs to; None outside experts.
    """

    name: str
    hf: tuple[str, ...]
    cut: Cut
    join: Join
    layer: int | None = None
    expert: int | None = None


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's names of parameters that Megatron's local layers have too."""


def general(name: str) -> str:
    """The name that is used here of a parameter of either kind of layers."""
    for fused, here in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + here
    return name


def parameters(shape: ModelShape) -> list[Parameter]:
    """Every parameter of the model in a fixed order, the same on every rank."""
    found = [_single(EMBEDDING, "model.embed_tokens.weight", Cut.VOCAB_ROWS)]
    for layer in range(shape.layers):
        found += _layer(shape, layer)
    found.append(_single(FINAL_NORM, "model.norm.weight", Cut.WHOLE))
    if not shape.tied:
        found.append(_single(HEAD, "lm_head.weight", Cut.VOCAB_ROWS))
    return found


def _single(name: str, hf: str, cut: Cut, layer: int | None = None) -> Parameter:
    return Parameter(name=name, hf=(hf,), cut=cut, join=Join.SAME, layer=layer)


def _layer(shape: ModelShape, layer: int) -> list[Parameter]:
    hf, name = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    found = [
        _single(f"{name}input_layernorm.weight", f"{hf}input_layernorm.weight", Cut.WHOLE, layer),
        _qkv(name, hf, "weight", layer),
    ]
    if shape.attention_bias:
        found.append(_qkv(name, hf, "bias", layer))
    if shape.qk_norm:
        found += [
            _single(f"{name}self_attention.{x}_layernorm.weight", f"{hf}self_attn.{x}_norm.weight", Cut.WHOLE, layer)
            for x in "qk"
        ]
    found += [
        _single(f"{name}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", Cut.COLUMNS, layer),
        _single(f"{name}pre_mlp_layernorm.weight", f"{hf}post_attention_layernorm.weight", Cut.WHOLE, layer),
    ]
    if shape.experts is None:
        return found + _feed_forward(f"{name}mlp.", f"{hf}mlp.", layer)
    found.append(_single(f"{name}mlp.router.weight", f"{hf}mlp.gate.weight", Cut.WHOLE, layer))
    for expert in range(shape.experts.count):
        found += _feed_forward(
            f"{name}mlp.experts.local_experts.{expert}.", f"{hf}mlp.experts.{expert}.", layer, expert=expert
        )
    return found


def _feed_forward(name: str, hf: str, layer: int, *, expert: int | None = None) -> list[Parameter]:
    """A gated block; an expert is whole on its rank, since expert-tensor parallelism is 1."""
    gate_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    rows, columns = (Cut.GATED_ROWS, Cut.COLUMNS) if expert is None else (Cut.WHOLE, Cut.WHOLE)
    return [
        Parameter(name=f"{name}linear_fc1.weight", hf=gate_up, cut=rows, join=Join.GATE_UP, layer=layer, expert=expert),
        Parameter(
            name=f"{name}linear_fc2.weight",
            hf=(f"{hf}down_proj.weight",),
            cut=columns,
            join=Join.SAME,
            layer=layer,
            expert=expert,
        ),
    ]


def _qkv(name: str, hf: str, kind: str, layer: int) -> Parameter:
    tensors = tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv")
    return Parameter(
        name=f"{name}self_attention.linear_qkv.{kind}", hf=tensors, cut=Cut.ROWS, join=Join.QKV, layer=layer
    )


def hf_sizes(parameter: Parameter, shape: ModelShape) -> list[tuple[int, ...]]:
    """Dimensions of the Hugging Face tensors of a parameter, in order."""
    hidden, query, key = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if parameter.join is Join.QKV:
        tail = (hidden,) if parameter.name.endswith("weight") else ()
        return [(query, *tail), (key, *tail), (key, *tail)]
    if parameter.join is Join.GATE_UP:
        return [(shape.ffn, hidden)] * 2
    sizes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab_size, hidden),
        HEAD: (shape.vocab_size, hidden),
        "q_layernorm.weight": (shape.head_dim,),
        "k_layernorm.weight": (shape.head_dim,),
        "linear_proj.weight": (hidden, query),
        "router.weight": (shape.experts.count if shape.experts else 0, hidden),
        "linear_fc2.weight": (hidden, shape.ffn),
    }
    tail_name = ".".join(parameter.name.split(".")[-2:])
    return [sizes.get(parameter.name, sizes.get(tail_name, (hidden,)))]
