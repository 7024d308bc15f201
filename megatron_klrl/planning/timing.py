"""Seconds of each phase from compute, memory bandwidth and links, and which of them decides. An estimate to rank by.

Nothing overlaps: that is how this version runs. Rates are peaks times the shares that ``hardware.Hardware`` assumes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_klrl.config.recipe import Quantization, Recompute
from megatron_klrl.planning.hardware import Hardware
from megatron_klrl.planning.memory import FP32_BYTES, Stage, cache_bytes_per_token, concurrent
from megatron_klrl.planning.work import microbatch

_LATENCY_S = 1e-5  # of one collective; an assumption
COMPUTE, BANDWIDTH, NVLINK, NETWORK, IDLE = "compute", "memory bandwidth", "NVLink", "network", "pipeline bubble"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """Seconds of a phase.

    Attributes:
        name: generate, score, train or sync.
        parts: seconds by what takes them.
    """

    name: str
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the phase."""
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """What takes the largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def phase_times(stage: Stage, hardware: Hardware) -> list[PhaseTime]:
    """All four phases; of stages only the layout counts here."""
    return [
        PhaseTime(name="generate", parts=_generate(stage, hardware)),
        PhaseTime(name="score", parts=_score(stage, hardware)),
        PhaseTime(name="train", parts=_train(stage, hardware)),
        PhaseTime(name="sync", parts=_sync(stage, hardware)),
    ]


def _flops_per_s(stage: Stage, hardware: Hardware) -> float:
    peak = hardware.fp8_tflops if stage.work.fp8 else hardware.bf16_tflops
    return peak * 1e12 * hardware.product_share


def _link(hardware: Hardware, ranks: int) -> tuple[str, float]:
    """Name and bytes a second of what joins so many neighbouring ranks."""
    if ranks <= hardware.gpus_per_node:
        return NVLINK, hardware.nvlink_gb_s * 1e9 * hardware.link_share
    return NETWORK, hardware.network_gb_s * 1e9 * hardware.link_share


def _forward_flops(stage: Stage) -> float:
    """Of one forward pass over a step's sequences, on all GPUs together."""
    work = stage.work
    products = 2.0 * stage.model.active_parameters * work.tokens
    return products + work.sequences * stage.model.attention_flops(work.prompt + work.response)


def _bubble(stage: Stage) -> float:
    count = microbatch(stage.recipe, stage.work, stage.layout).count
    return (stage.layout.pipeline - 1) / (stage.layout.virtual * count)


def _layer_traffic(stage: Stage, hardware: Hardware) -> dict[str, float]:
    """Seconds of the collectives of one forward pass over the tokens of one rank, by link."""
    layout, model, work = stage.layout, stage.model, stage.work
    tokens = work.tokens / (layout.data * layout.context)  # that meet one rank's layers
    layers = model.layers / layout.pipeline
    numbers: list[tuple[int, float]] = []
    if layout.tensor > 1:
        numbers.append((layout.tensor, 2 * 2 * (layout.tensor - 1) / layout.tensor * tokens * model.hidden * layers))
    if layout.context > 1:
        keys = 2 * model.kv_heads * model.head_dim / layout.tensor
        others = (layout.context - 1) * tokens
        numbers.append((layout.tensor * layout.context, others * keys * layers))
    if layout.expert > 1 and model.mixture is not None:
        sent = 2 * model.mixture.per_token * (layout.expert - 1) / layout.expert * tokens / layout.tensor
        numbers.append((layout.expert, sent * model.hidden * layers))
    found: dict[str, float] = {}
    for ranks, count in numbers:
        name, rate = _link(hardware, ranks)
        found[name] = found.get(name, 0.0) + count * work.number_bytes / rate
    return found


def _score(stage: Stage, hardware: Hardware) -> dict[str, float]:
    """A forward pass of the policy, and one of the reference."""
    passes = 2 if stage.work.has_reference else 1
    compute = passes * _forward_flops(stage) / (stage.layout.gpus * _flops_per_s(stage, hardware))
    traffic = {name: passes * seconds for name, seconds in _layer_traffic(stage, hardware).items()}
    return {COMPUTE: compute, IDLE: compute * _bubble(stage), **traffic}


def _train(stage: Stage, hardware: Hardware) -> dict[str, float]:
    """Forward and backward of every token once, what is computed again, and the gradient's way over data ranks."""
    layout, forward = stage.layout, _forward_flops(stage)
    again = 0.0
    if layout.recompute is Recompute.FULL:
        again = forward
    elif layout.recompute is Recompute.ATTENTION:
        again = stage.work.sequences * stage.model.attention_flops(stage.work.prompt + stage.work.response)
    compute = (3 * forward + again) / (layout.gpus * _flops_per_s(stage, hardware))
    passes = 3 if layout.recompute is Recompute.FULL else 2  # collectives of a backward are those of a forward
    parts = {COMPUTE: compute, IDLE: compute * _bubble(stage)}
    for name, seconds in _layer_traffic(stage, hardware).items():
        parts[name] = parts.get(name, 0.0) + passes * seconds
    each = FP32_BYTES + stage.work.number_bytes  # gradients scattered, weights gathered
    for numbers, ranks in ((stage.dense, layout.data * layout.context), (stage.experts, layout.expert_data)):
        name, rate = _link(hardware, layout.gpus)
        seconds = numbers * each * (ranks - 1) / ranks / rate * stage.recipe.loop.updates_per_batch
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _generate(stage: Stage, hardware: Hardware) -> dict[str, float]:
    """Waves of sequences, each a prefill and then a step for each token; at the end the longest response, alone.

    Of a step's many responses one is taken to reach the limit, whatever they are on average: the phase waits for it.
    """
    layout, model, work = stage.layout, stage.model, stage.work
    at_once = concurrent(stage)
    engines = layout.gpus // layout.engine_tensor
    waves = -(-work.sequences // (engines * at_once))
    rate = _flops_per_s(stage, hardware) * layout.engine_tensor
    parts = {COMPUTE: waves * at_once * work.prompt * 2.0 * model.active_parameters / rate, BANDWIDTH: 0.0}
    tail = max(0, work.longest - work.prompt - work.response)
    for steps, sequences, length in (
        (waves * work.response, at_once, work.prompt + work.response / 2),
        (tail, 1, work.longest - tail / 2),
    ):
        for name, seconds in _decoding_step(stage, hardware, sequences=sequences, length=length).items():
            parts[name] = parts.get(name, 0.0) + steps * seconds
    return parts


def _decoding_step(stage: Stage, hardware: Hardware, *, sequences: int, length: float) -> dict[str, float]:
    """A token of each of an engine's sequences, of so many tokens on average: the longer of products and reading."""
    layout, model = stage.layout, stage.model
    read = _read_weights(stage, sequences) / layout.engine_tensor + sequences * length * cache_bytes_per_token(stage)
    bandwidth = read / (hardware.memory_tb_s * 1e12 * hardware.memory_share)
    rate = _flops_per_s(stage, hardware) * layout.engine_tensor
    compute = 2.0 * model.active_parameters * sequences / rate
    found = {COMPUTE: compute} if compute > bandwidth else {BANDWIDTH: bandwidth}
    if layout.engine_tensor > 1:
        name, link = _link(hardware, layout.engine_tensor)
        sent = 2 * (layout.engine_tensor - 1) / layout.engine_tensor * sequences * model.hidden
        found[name] = 2 * model.layers * (sent * stage.work.number_bytes / link + _LATENCY_S)
    return found


def _read_weights(stage: Stage, at_once: int) -> float:
    """Bytes of weights that a decoding step touches: of experts, those that any of the sequences asks for."""
    model, width = (
        stage.model,
        1 if stage.recipe.generation.quantization is Quantization.FP8 else stage.work.number_bytes,
    )
    touched = float(model.parameters)
    if model.mixture is not None:
        idle = (1 - model.mixture.per_token / model.mixture.count) ** at_once
        touched -= model.expert_parameters * idle
    return touched * width


def _sync(stage: Stage, hardware: Hardware) -> dict[str, float]:
    """Every rank takes every tensor; where it has them already, they are copied in its memory."""
    layout, size = stage.layout, stage.model.parameters * stage.work.number_bytes
    copy = 2 * size / (hardware.memory_tb_s * 1e12 * hardware.memory_share)
    if layout.replica == 1:
        return {BANDWIDTH: copy}
    name, rate = _link(hardware, layout.gpus)
    return {BANDWIDTH: copy, name: size / rate}
