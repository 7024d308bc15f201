"""A plan as text and as data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_klrl.planning.hardware import Hardware
from megatron_klrl.planning.memory import PhaseMemory
from megatron_klrl.planning.model import PlannedModel
from megatron_klrl.planning.plan import HEADROOM_BYTES, LayoutPlan, Request
from megatron_klrl.planning.work import Work

GIB = 2**30


def memory_lines(memory: Sequence[PhaseMemory]) -> list[str]:
    """A table: what is alive at the peak of each phase, in MiB."""
    names = dict.fromkeys(name for phase in memory for name in phase.parts)
    head = f"  {'MiB':<30}" + "".join(f"{phase.name:>12}" for phase in memory)
    rows = [
        f"  {name:<30}" + "".join(f"{_mib(phase.parts.get(name, 0)):>12}" for phase in memory)
        for name in names
        if any(phase.parts.get(name) for phase in memory)
    ]
    total = f"  {'together':<30}" + "".join(f"{_mib(phase.total):>12}" for phase in memory)
    return [head, *rows, total]


def _mib(value: int) -> str:
    return f"{value / 2**20:,.1f}" if value else "-"


def time_lines(one: LayoutPlan, work: Work) -> list[str]:
    """Seconds of each phase and what takes them."""
    lines = [
        f"  {phase.name:<9}{phase.seconds:>10.3g} s  "
        + ", ".join(f"{name} {part:.3g}" for name, part in phase.parts.items() if part >= 0.01 * phase.seconds)
        for phase in one.times
    ]
    rate = work.tokens / one.seconds
    last = f"  a step   {one.seconds:>10.3g} s  {rate:,.0f} tokens/s, {rate / one.layout.gpus:,.0f} of each GPU"
    slowest = one.slowest
    return [*lines, last, f"  bottleneck: {slowest.name}, by {slowest.bottleneck}"]


def model_line(model: PlannedModel) -> str:
    """Like ``Qwen2.5-7B: 7.62 B parameters``."""
    text = f"{model.name} ({model.architecture}): {model.parameters / 1e9:.2f} B parameters"
    if model.mixture is not None:
        text += f", {model.active_parameters / 1e9:.2f} B of them at work on a token"
    return text if model.trainable else f"{text}; planned only: this version does not train the architecture"


def hardware_line(hardware: Hardware) -> str:
    """The assumptions of the times."""
    return (
        f"assumed of {hardware.name}: {hardware.bf16_tflops:g} bf16 and {hardware.fp8_tflops:g} fp8 TFLOP/s x "
        f"{hardware.product_share:g}, memory {hardware.memory_tb_s:g} TB/s x {hardware.memory_share:g}, NVLink "
        f"{hardware.nvlink_gb_s:g} and network {hardware.network_gb_s:g} GB/s x {hardware.link_share:g}; "
        f"peaks from {hardware.source}"
    )


def fit_line(one: LayoutPlan, memory_bytes: int) -> str:
    """Whether a layout fits, and by what."""
    needed = one.peak.total + HEADROOM_BYTES
    verdict = "fits" if needed <= memory_bytes else "DOES NOT FIT"
    return (
        f"{verdict}: {one.peak.name} needs {one.peak.total / GIB:.1f} GiB and an assumed "
        f"{HEADROOM_BYTES / GIB:.0f} GiB beside tensors, of {memory_bytes / GIB:.1f} GiB"
    )


def host_lines(one: LayoutPlan, hardware: Hardware | None) -> list[str]:
    """What the hosts must hold meanwhile, if anything."""
    if not one.host_bytes or hardware is None:
        return []
    node = one.host_bytes * min(hardware.gpus_per_node, one.layout.gpus)
    return [f"on the host while generating: {one.host_bytes / GIB:.1f} GiB of a rank, {node / GIB:.1f} GiB of a node"]


def layout_lines(found: Sequence[LayoutPlan], *, most: int) -> list[str]:
    """Layouts that fit, quickest first."""
    rows = [
        f"  {one.seconds:>9.3g} s {one.peak.total / GIB:9.1f} GiB  {one.layout.text()}"
        f"  ({one.slowest.name}: {one.slowest.bottleneck})"
        for one in found[:most]
    ]
    return [f"{len(found)} layouts fit; a step's seconds, peak, and what decides:", *rows]


def as_data(one: LayoutPlan) -> dict[str, Any]:
    """For machines."""
    return {
        "layout": {**asdict(one.layout), "data": one.layout.data},
        "stage": one.stage,
        "memory_bytes": {phase.name: {**phase.parts, "total": phase.total} for phase in one.memory},
        "peak": {"phase": one.peak.name, "bytes": one.peak.total},
        "host_bytes": one.host_bytes,
        "seconds": {phase.name: {**phase.parts, "total": phase.seconds} for phase in one.times},
        "bottleneck": {"phase": one.slowest.name, "by": one.slowest.bottleneck} if one.times else None,
    }


def request_data(wanted: Request) -> dict[str, Any]:
    """The assumptions of a plan, for machines."""
    model = asdict(wanted.model) | {
        "parameters": wanted.model.parameters,
        "active_parameters": wanted.model.active_parameters,
        "trainable": wanted.model.trainable,
    }
    hardware = None if wanted.hardware is None else asdict(wanted.hardware)
    return {"model": model, "work": asdict(wanted.work) | {"tokens": wanted.work.tokens}, "hardware": hardware}
