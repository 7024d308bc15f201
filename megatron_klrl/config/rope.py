"""Rotary position embeddings as `config.json` states them, in the spelling of transformers 4 and of transformers 5."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron_klrl.config.json_fields import JsonFields

_DEFAULT_THETA = 10_000.0  # what transformers takes when a config.json says nothing
# Megatron-Core has these three built in: only the factor of Llama 3's frequency scaling can be chosen.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


class RopeKind(StrEnum):
    """Frequency scaling of the rotary embedding."""

    DEFAULT = "default"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        kind: frequency scaling.
        factor: by how much llama3 scaling slows the low frequencies; 1 for default.
    """

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0


def read_rope(config: JsonFields) -> Rope:
    """Read ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (transformers 4).

    Raises:
        UserError: a scaling that cannot be reproduced exactly.
    """
    section = _section(config)
    theta = section.number("rope_theta", default=config.number("rope_theta", default=_DEFAULT_THETA))
    if {section.values.get("partial_rotary_factor", 1.0), config.values.get("partial_rotary_factor", 1.0)} != {1.0}:
        raise config.error("rotates only a part of each head, which is not supported", fix="give another model")
    name = section.values.get("rope_type", section.values.get("type", RopeKind.DEFAULT))
    if name == RopeKind.DEFAULT:
        return Rope(theta=theta)
    if name != RopeKind.LLAMA3:
        problem = f"rope type {name!r} is not supported, only {' and '.join(RopeKind)}"
        raise config.error(problem, fix="give a model without that scaling")
    for key, wanted in _LLAMA3.items():
        if section.number(key) != wanted:
            problem = f"{key} of the llama3 rope is {section.values[key]}, only {wanted:g} is supported"
            raise config.error(problem, fix="give a Llama 3.1 or 3.2 model")
    return Rope(theta=theta, kind=RopeKind.LLAMA3, factor=section.number("factor"))


def _section(config: JsonFields) -> JsonFields:
    values = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        problem = "rope settings per layer type are not supported"
        raise config.error(problem, fix="give a model with one rotary embedding for all layers")
    return JsonFields(file=config.file, values=values)
