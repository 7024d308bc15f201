"""Is this folder a Hugging Face model that can be trained here, and what is its shape? Reads JSON only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.assets import embedded_model
from megatron_klrl.config.json_fields import JsonFields
from megatron_klrl.config.rope import Rope, read_rope
from megatron_klrl.errors import UserError

QWEN2 = "Qwen2ForCausalLM"
QWEN3 = "Qwen3ForCausalLM"
QWEN3_MOE = "Qwen3MoeForCausalLM"
LLAMA = "LlamaForCausalLM"
ARCHITECTURES = (QWEN2, QWEN3, QWEN3_MOE, LLAMA)
EMBEDDED = "embedded:"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts in every layer.

    Attributes:
        count: experts of a layer.
        per_token: experts that each token is sent to.
        ffn: width inside one expert.
        normalised: the weights of a token's experts are scaled to sum to 1.
    """

    count: int
    per_token: int
    ffn: int
    normalised: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the trainer must know of a model before a weight is read.

    Attributes:
        path: the folder.
        architecture: one of `ARCHITECTURES`.
        hidden_size: width of the residual stream.
        layers: transformer layers.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        head_dim: width of a head.
        ffn: width inside the gated feed-forward block; that of one expert in a mixture.
        vocab_size: rows of the embedding.
        tied: the output layer is the embedding.
        attention_bias: query, key and value projections have a bias (the output projection never has).
        qk_norm: queries and keys are RMS-normalised per head.
        rope: rotary position embedding.
        max_position_embeddings: longest sequence, tokens.
        rms_norm_eps: added to the mean square in RMS normalisation.
        eos_ids: ids of the tokens that end a response.
        experts: the mixture of experts; None in a dense model.
    """

    path: Path
    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    qk_norm: bool
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float
    eos_ids: tuple[int, ...]
    experts: Experts | None = None

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, tied ones counted once."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        attention += (query + 2 * key_value) if self.attention_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + norms
        layer += self.hidden_size * self.experts.count if self.experts else 3 * self.hidden_size * self.ffn
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden_size + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Those of them that lie in experts."""
        return self.layers * self.experts.count * 3 * self.hidden_size * self.ffn if self.experts else 0


def resolve_folder(path: str) -> Path:
    """The folder a recipe's model path names; ``embedded:<name>`` is a model that ships with the package.

    Raises:
        UserError: there is no embedded model of that name.
    """
    if path.startswith(EMBEDDED):
        return embedded_model(path.removeprefix(EMBEDDED))
    return Path(path).expanduser()


def describe_model(path: str | Path) -> ModelShape:
    """Check a model folder and read its shape from ``config.json``.

    Args:
        path: Hugging Face folder, or ``embedded:<name>``.

    Raises:
        UserError: no such folder, a file missing, or a model that cannot be trained; names the folder and the fix.
    """
    folder = resolve_folder(str(path))
    _check_files(folder)
    config = JsonFields(file=folder / "config.json", values=_read_json(folder / "config.json"))
    architecture = _architecture(config)
    _refuse_unsupported(config)
    heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    experts = _experts(config) if architecture == QWEN3_MOE else None
    return ModelShape(
        path=folder,
        architecture=architecture,
        hidden_size=hidden_size,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", default=heads if architecture == LLAMA else None),
        head_dim=_head_dim(config, architecture, hidden_size=hidden_size, heads=heads),
        ffn=experts.ffn if experts else config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        tied=config.flag("tie_word_embeddings", default=False),
        attention_bias=architecture == QWEN2,
        qk_norm=architecture in (QWEN3, QWEN3_MOE),
        rope=read_rope(config),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps"),
        eos_ids=_eos_ids(folder, config),
        experts=experts,
    )


def _check_files(folder: Path) -> None:
    field = "model.path"
    if not folder.exists():
        fix = f"give an existing Hugging Face folder, or {EMBEDDED}arithmetic"
        raise UserError(f"there is no folder {folder}", field=field, fix=fix)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder", field=field, fix=f"give its folder {folder.parent}")
    if not (folder / "config.json").is_file():
        fix = "give the folder save_pretrained wrote"
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face folder", field=field, fix=fix)
    _check_weights(folder)
    if not (folder / "tokenizer.json").is_file():
        fix = f"save a fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        raise UserError(f"{folder} has no tokenizer.json", field=field, fix=fix)


def _check_weights(folder: Path) -> None:
    field, index = "model.path", folder / _WEIGHTS_INDEX
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, Mapping) else []
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            what = f"lacks {', '.join(missing[:3])}" if missing else f"has a {_WEIGHTS_INDEX} without weight_map"
            raise UserError(
                f"{folder} {what}", field=field, fix="copy the folder again, all safetensors files included"
            )
    elif not (folder / _WEIGHTS).is_file():
        fix = "convert the weights: model.save_pretrained(folder) of transformers writes safetensors"
        raise UserError(f"{folder} has no {_WEIGHTS}, nor a {_WEIGHTS_INDEX}", field=field, fix=fix)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"is not JSON ({error})", field=str(file), fix="copy the file again from where it came"
        ) from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", field=str(file), fix="copy the file again from where it came")
    return value


def _architecture(config: JsonFields) -> str:
    names = config.values.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES:
        return str(names[0])
    problem = f"architectures is {names!r}; this version trains {', '.join(ARCHITECTURES)}"
    raise config.error(problem, fix="give a model of one of these architectures")


def _refuse_unsupported(config: JsonFields) -> None:
    """Everything that would change the model's function and that the trainer does not build."""
    layer_types = config.values.get("layer_types") or []
    if config.values.get("use_sliding_window") or "sliding_attention" in layer_types:
        raise config.error("uses sliding-window attention, which is not supported", fix="give a full-attention model")
    if config.values.get("attention_bias"):
        problem = "attention_bias is true: a bias on the output projection is not supported"
        raise config.error(problem, fix="give a model without it")
    if config.values.get("mlp_bias"):
        raise config.error("mlp_bias is true, which is not supported", fix="give a model without it")
    if config.values.get("hidden_act", "silu") != "silu":
        problem = f"hidden_act is {config.values['hidden_act']!r}; only silu is supported"
        raise config.error(problem, fix="give a model with SwiGLU blocks")
    if config.values.get("quantization_config"):
        raise config.error("the weights are quantised", fix="give the unquantised model; training needs its weights")


def _head_dim(config: JsonFields, architecture: str, *, hidden_size: int, heads: int) -> int:
    if config.values.get("head_dim") is not None:
        return config.integer("head_dim")
    if architecture == QWEN3:
        return 128  # Qwen3Config's own default in transformers; not hidden_size / heads as in the other families
    if hidden_size % heads:
        problem = (
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
        )
        raise config.error(problem, fix="add head_dim")
    return hidden_size // heads


def _experts(config: JsonFields) -> Experts:
    if config.integer("decoder_sparse_step", default=1) != 1 or config.values.get("mlp_only_layers"):
        problem = "has dense layers among its expert layers (decoder_sparse_step, mlp_only_layers), not supported"
        raise config.error(problem, fix="give a model with experts in every layer")
    # transformers 5 writes num_local_experts, the published folders have num_experts
    name = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
    return Experts(
        count=config.integer(name),
        per_token=config.integer("num_experts_per_tok"),
        ffn=config.integer("moe_intermediate_size"),
        normalised=config.flag("norm_topk_prob", default=False),
    )


def _eos_ids(folder: Path, config: JsonFields) -> tuple[int, ...]:
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    value = generation.get("eos_token_id")
    if value is None:
        value = config.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        problem = f"{folder} names no end-of-sequence token (eos_token_id is {value!r})"
        fix = "set eos_token_id in generation_config.json to an id, or to a list of ids"
        raise UserError(problem, field="model.path", fix=fix)
    return tuple(ids)
