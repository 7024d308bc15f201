"""Which Hugging Face tensors make each Megatron parameter, and how it is cut over the tensor-parallel ranks.

Pure: tensors in, tensors out; no process groups. Covers the dense Llama, Qwen2 and Qwen3 families.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

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
    """

    name: str
    hf: tuple[str, ...]
    cut: Cut
    join: Join
    layer: int | None = None


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


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
    gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
    found += [
        _single(f"{name}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", Cut.COLUMNS, layer),
        _single(f"{name}pre_mlp_layernorm.weight", f"{hf}post_attention_layernorm.weight", Cut.WHOLE, layer),
        Parameter(name=f"{name}mlp.linear_fc1.weight", hf=gate_up, cut=Cut.GATED_ROWS, join=Join.GATE_UP, layer=layer),
        _single(f"{name}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", Cut.COLUMNS, layer),
    ]
    return found


def _qkv(name: str, hf: str, kind: str, layer: int) -> Parameter:
    tensors = tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv")
    return Parameter(
        name=f"{name}self_attention.linear_qkv.{kind}", hf=tensors, cut=Cut.ROWS, join=Join.QKV, layer=layer
    )


def join(parameter: Parameter, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The full parameter from its Hugging Face tensors."""
    if parameter.join is Join.SAME:
        return tensors[0]
    if parameter.join is Join.GATE_UP:
        return torch.cat(list(tensors))
    per_group = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(per_group, dim=1).reshape(-1, *tensors[0].shape[1:])


def split(parameter: Parameter, full: Tensor, shape: ModelShape) -> list[Tensor]:
    """The Hugging Face tensors of a full parameter; the inverse of ``join``."""
    if parameter.join is Join.SAME:
        return [full]
    if parameter.join is Join.GATE_UP:
        return list(full.chunk(2))
    heads = shape.heads // shape.kv_heads
    grouped = full.reshape(shape.kv_heads, (heads + 2) * shape.head_dim, *full.shape[1:])
    parts = grouped.split([heads * shape.head_dim, shape.head_dim, shape.head_dim], dim=1)
    return [p.reshape(-1, *full.shape[1:]) for p in parts]


def cut(parameter: Parameter, full: Tensor, rank: int, ranks: int) -> Tensor:
    """The part of a full parameter that one tensor-parallel rank holds."""
    if ranks == 1 or parameter.cut is Cut.WHOLE:
        return full
    if parameter.cut is Cut.COLUMNS:
        return full.chunk(ranks, 1)[rank]
    if parameter.cut is Cut.GATED_ROWS:
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    if parameter.cut is Cut.VOCAB_ROWS:
        full = torch.nn.functional.pad(full, (0, 0, 0, -full.shape[0] % ranks))
    return full.chunk(ranks)[rank]


def uncut(parameter: Parameter, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The full parameter from every rank's part; the inverse of ``cut``."""
    if len(parts) == 1 or parameter.cut is Cut.WHOLE:
        return parts[0]
    if parameter.cut is Cut.COLUMNS:
        return torch.cat(list(parts), 1)
    if parameter.cut is Cut.GATED_ROWS:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    full = torch.cat(list(parts))
    return full[: shape.vocab_size] if parameter.cut is Cut.VOCAB_ROWS else full


def full_size(parameter: Parameter, shape: ModelShape) -> tuple[int, ...]:
    """Dimensions of the full parameter, vocabulary padding excluded."""
    hidden, query = shape.hidden_size, shape.heads * shape.head_dim
    fused = query + 2 * shape.kv_heads * shape.head_dim
    tail = parameter.name.removeprefix(f"decoder.layers.{parameter.layer}.")
    sizes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab_size, hidden),
        HEAD: (shape.vocab_size, hidden),
        "self_attention.linear_qkv.weight": (fused, hidden),
        "self_attention.linear_qkv.bias": (fused,),
        "self_attention.q_layernorm.weight": (shape.head_dim,),
        "self_attention.k_layernorm.weight": (shape.head_dim,),
        "self_attention.linear_proj.weight": (hidden, query),
        "mlp.linear_fc1.weight": (2 * shape.ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, shape.ffn),
    }
    return sizes.get(tail, (hidden,))
