"""The sizes of a model that memory and time depend on, read from ``config.json`` alone: no weights are needed.

More architectures than can be trained: a plan for DeepSeek-V3 is useful before its attention is. ``trainable`` says
which of the two it is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.config.json_fields import JsonFields
from megatron_klrl.config.model_folder import ARCHITECTURES, LLAMA, QWEN2, QWEN3, QWEN3_MOE, resolve_folder
from megatron_klrl.errors import UserError

DEEPSEEK_V3 = "DeepseekV3ForCausalLM"
PLANNED = (*ARCHITECTURES, DEEPSEEK_V3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention.

    Attributes:
        query_rank: width that queries are compressed to; 0 where they are not.
        key_value_rank: width that keys and values are compressed to, and cached in.
        nope: width of a head without rotary embedding.
        rope: width of a head with it; of the key it is shared by all heads.
        value: width of a value head.
    """

    query_rank: int
    key_value_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts of a layer.

    Attributes:
        count: experts.
        per_token: that each token is sent to.
        ffn: width inside one of them.
        shared_ffn: width of what every token passes beside them; 0 where there is none.
        dense_layers: layers at the start that have no experts.
    """

    count: int
    per_token: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """Sizes of a model.

    Attributes:
        name: of its folder.
        architecture: one of ``PLANNED``.
        hidden: width of the residual stream.
        layers: transformer layers.
        heads: query heads.
        kv_heads: key-value heads; all heads under latent attention.
        head_dim: width of a head; of its query and key under latent attention.
        ffn: width of a dense feed-forward block; 0 where every layer has experts.
        vocab: rows of the embedding.
        positions: longest sequence.
        tied: the output layer is the embedding.
        qkv_bias: query, key and value projections have a bias.
        qk_norm: queries and keys are normalised per head.
        mixture: experts; None in a dense model.
        latent: latent attention; None for grouped-query attention.
    """

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    mixture: Mixture | None = None
    latent: Latent | None = None

    @property
    def trainable(self) -> bool:
        """Whether this version trains the architecture."""
        return self.architecture in ARCHITECTURES

    @property
    def _layers_without(self) -> int:
        return self.layers if self.mixture is None else self.mixture.dense_layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts."""
        return self.mixture is not None and layer >= self.mixture.dense_layers

    # -- parameters ------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        first, last = self.dense_part(0), self.dense_part(self.layers - 1)
        layers = self._layers_without * first + (self.layers - self._layers_without) * last
        return layers + self.expert_parameters + embeddings + self.hidden

    @property
    def expert_parameters(self) -> int:
        """Those in experts, the shared ones left out."""
        return (self.layers - self._layers_without) * self.expert_part(self.layers - 1)

    @property
    def active_parameters(self) -> int:
        """Those that a token is multiplied with, output layer included, embedding left out."""
        idle = 0
        if self.mixture is not None:
            idle = self.expert_parameters * (self.mixture.count - self.mixture.per_token) // self.mixture.count
        return self.parameters - idle - (0 if self.tied else self.vocab * self.hidden)

    def dense_part(self, layer: int, *, tensor: int = 1) -> int:
        """Parameters of a layer outside its experts, on one of ``tensor`` ranks."""
        whole, cut = self._attention()
        whole += 2 * self.hidden
        if not self.has_experts(layer):
            cut += 3 * self.hidden * self.ffn
        elif self.mixture is not None:
            whole += self.hidden * self.mixture.count + self._router_bias()
            cut += 3 * self.hidden * self.mixture.shared_ffn
        return whole + -(-cut // tensor)

    def expert_part(self, layer: int, *, expert: int = 1) -> int:
        """Parameters of a layer's experts on one of ``expert`` ranks."""
        if self.mixture is None or not self.has_experts(layer):
            return 0
        return self.mixture.count // expert * 3 * self.hidden * self.mixture.ffn

    def _router_bias(self) -> int:
        return self.mixture.count if self.mixture is not None and self.architecture == DEEPSEEK_V3 else 0

    def _attention(self) -> tuple[int, int]:
        """Parameters that every tensor-parallel rank holds, and those that are cut."""
        if self.latent is None:
            query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
            cut = self.hidden * (2 * query + 2 * key_value) + (query + 2 * key_value if self.qkv_bias else 0)
            return 2 * self.head_dim if self.qk_norm else 0, cut
        latent, query = self.latent, self.heads * (self.latent.nope + self.latent.rope)
        down = self.hidden * (latent.key_value_rank + latent.rope) + latent.key_value_rank
        cut = latent.key_value_rank * self.heads * (latent.nope + latent.value)
        cut += self.heads * latent.value * self.hidden
        if latent.query_rank:
            return down + self.hidden * latent.query_rank + latent.query_rank, cut + latent.query_rank * query
        return down, cut + self.hidden * query

    def cached_numbers(self, *, tensor: int) -> int:
        """Numbers that the key-value cache of one of ``tensor`` engine ranks holds for a token."""
        if self.latent is not None:  # what is cached is shared by all heads, so every rank has it
            return self.layers * (self.latent.key_value_rank + self.latent.rope)
        return self.layers * 2 * self.head_dim * max(1, -(-self.kv_heads // tensor))

    def attention_flops(self, tokens: int) -> float:
        """Multiply-adds times two of one sequence's causal attention scores and their use, forward."""
        value = self.latent.value if self.latent is not None else self.head_dim
        return self.layers * self.heads * (self.head_dim + value) * float(tokens) ** 2


def read_model(path: str) -> PlannedModel:
    """Read the sizes of a Hugging Face folder, of a folder that holds ``config.json`` alone, or of such a file.

    Raises:
        UserError: nothing is there, or an architecture whose sizes are not known here.
    """
    place = resolve_folder(path)
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        fix = "give a Hugging Face folder, or its config.json"
        raise UserError(f"there is no config.json at {place}", field="model.path", fix=fix)
    config = JsonFields(file=file, values=_json(file))
    names = config.values.get("architectures")
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else None
    if architecture not in PLANNED:
        problem = f"architectures is {names!r}; plans are made for {', '.join(PLANNED)}"
        raise config.error(problem, fix="give a model of one of these architectures")
    name = place.name if place.is_dir() else place.parent.name
    return _deepseek(config, name) if architecture == DEEPSEEK_V3 else _grouped(config, name, str(architecture))


def _json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is not JSON ({error})", field=str(file), fix="copy the file again") from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", field=str(file), fix="copy the file again")
    return value


def _grouped(config: JsonFields, name: str, architecture: str) -> PlannedModel:
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    mixture = None
    if architecture == QWEN3_MOE:
        count = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
        mixture = Mixture(
            count=config.integer(count),
            per_token=config.integer("num_experts_per_tok"),
            ffn=config.integer("moe_intermediate_size"),
        )
    return PlannedModel(
        name=name,
        architecture=architecture,
        hidden=hidden,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", default=heads if architecture == LLAMA else None),
        head_dim=config.integer("head_dim", default=128 if architecture == QWEN3 else max(1, hidden // heads)),
        ffn=0 if mixture else config.integer("intermediate_size"),
        vocab=config.integer("vocab_size"),
        positions=config.integer("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings", default=False),
        qkv_bias=architecture == QWEN2,
        qk_norm=architecture in (QWEN3, QWEN3_MOE),
        mixture=mixture,
    )


def _deepseek(config: JsonFields, name: str) -> PlannedModel:
    expert_ffn = config.integer("moe_intermediate_size")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    heads = config.integer("num_attention_heads")
    return PlannedModel(
        name=name,
        architecture=DEEPSEEK_V3,
        hidden=config.integer("hidden_size"),
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope,
        ffn=config.integer("intermediate_size"),
        vocab=config.integer("vocab_size"),
        positions=config.integer("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings", default=False),
        qkv_bias=False,
        qk_norm=False,
        mixture=Mixture(
            count=config.integer("n_routed_experts"),
            per_token=config.integer("num_experts_per_tok"),
            ffn=expert_ffn,
            shared_ffn=expert_ffn * config.integer("n_shared_experts"),
            dense_layers=config.integer("first_k_dense_replace"),
        ),
        latent=Latent(
            query_rank=config.integer("q_lora_rank") if config.values.get("q_lora_rank") is not None else 0,
            key_value_rank=config.integer("kv_lora_rank"),
            nope=nope,
            rope=rope,
            value=config.integer("v_head_dim"),
        ),
    )
