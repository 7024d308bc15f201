"""GPUs as makers' data sheets describe them, and how much of that a program gets: every number can be replaced."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_klrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of GPU and what joins them.

    Attributes:
        name: of the preset.
        source: where the first six numbers are from.
        bf16_tflops: dense products of bf16 numbers, 1e12 operations a second.
        fp8_tflops: dense products of 8-bit numbers; 0 where the GPU has none.
        memory_gib: of one GPU.
        memory_tb_s: bandwidth of that memory, 1e12 bytes a second.
        nvlink_gb_s: to the GPUs of the same node, each direction, 1e9 bytes a second.
        network_gb_s: of each GPU to other nodes, each direction, 1e9 bytes a second.
        gpus_per_node: that NVLink joins.
        product_share: part of the peak that products reach in training; an assumption.
        memory_share: part of the bandwidth that decoding reaches; an assumption.
        link_share: part of the bandwidth that collectives reach; an assumption.
    """

    name: str
    source: str
    bf16_tflops: float
    fp8_tflops: float
    memory_gib: float
    memory_tb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    gpus_per_node: float = 8
    product_share: float = 0.4
    memory_share: float = 0.6
    link_share: float = 0.7


_SHEET = "NVIDIA's data sheet, dense rates; network: one 400 Gb/s adapter for each GPU"
PRESETS = {
    one.name: one
    for one in (
        Hardware(
            name="a100",
            source="NVIDIA's data sheet of the A100 SXM 80 GB, dense rates; network: one 200 Gb/s adapter for each GPU",
            bf16_tflops=312,
            fp8_tflops=0,
            memory_gib=80,
            memory_tb_s=2.0,
            nvlink_gb_s=300,
            network_gb_s=25,
        ),
        Hardware(
            name="h100",
            source=_SHEET,
            bf16_tflops=989,
            fp8_tflops=1979,
            memory_gib=80,
            memory_tb_s=3.35,
            nvlink_gb_s=450,
            network_gb_s=50,
        ),
        Hardware(
            name="h200",
            source=_SHEET,
            bf16_tflops=989,
            fp8_tflops=1979,
            memory_gib=131,
            memory_tb_s=4.8,
            nvlink_gb_s=450,
            network_gb_s=50,
        ),
        Hardware(
            name="b200",
            source=_SHEET,
            bf16_tflops=2250,
            fp8_tflops=4500,
            memory_gib=167,
            memory_tb_s=8.0,
            nvlink_gb_s=900,
            network_gb_s=50,
        ),
    )
}


def choose(name: str, assumptions: Sequence[str]) -> Hardware:
    """A preset, with numbers replaced.

    Args:
        name: of the preset.
        assumptions: ``field=number`` each.

    Raises:
        UserError: no such preset or field, or not a positive number.
    """
    if name not in PRESETS:
        raise UserError(f"there is no GPU {name!r}", field="--gpu", fix=f"take one of: {', '.join(PRESETS)}")
    numbers = [field.name for field in fields(Hardware) if field.name not in ("name", "source")]
    found = PRESETS[name]
    for assumption in assumptions:
        field, _, text = assumption.partition("=")
        if field not in numbers:
            fix = f"write one of these, = and a number: {', '.join(numbers)}"
            raise UserError(f"{assumption!r} replaces nothing", field="--assume", fix=fix)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"{text!r} is not a positive number", field="--assume", fix=f"write {field}=1.5, say")
        changed: dict[str, Any] = {field: value}
        found = replace(found, **changed)
    return found
