"""Weights that are kept in 8 bits alone: how they are read, written, trained, saved and streamed.

Products need a GPU, so gradients are drawn and not computed; tests/gpu has the whole.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_klrl.config.recipe import Fp8
from megatron_klrl.mcore.engine import MegatronEngine
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.model import unwrap
from megatron_klrl.mcore.precision import Products
from megatron_klrl.weight_sync.checksum import checksums
from tests.gpu.programs import drawn_step, transformer_engine_can_be_built
from tests.support.eight_bit import rounded, rounding_on_cpu
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

pytestmark = pytest.mark.skipif(not HAVE_TE, reason="Transformer Engine is not installed")

KEPT = Products(fp8=Fp8.TENSORWISE, primary_weights=True)
PRODUCTS = {"8 bits": KEPT, "bf16": None}
SHAPE = FAMILIES["qwen3_tied"]
JOINED = (
    ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    ("o_proj.weight",),
    ("gate_proj.weight", "up_proj.weight"),
    ("down_proj.weight",),
)
"""Endings of the tensors that are one parameter here, and have one scale."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), SHAPE)


@contextmanager
def engine_of(folder: Path, *, products: Products | None = KEPT, **options: Any) -> Iterator[MegatronEngine]:
    with (
        transformer_engine_can_be_built(),
        rounding_on_cpu(),
        trainer(folder, dtype=torch.bfloat16, layers=Layers.FUSED, products=products, **options) as engine,
    ):
        yield engine


def whole(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.export_weights()}


def exact(engine: MegatronEngine) -> dict[str, Tensor]:
    """The optimizer's own weights, by Megatron's names; of one data-parallel rank all of them."""
    named = unwrap(engine.chunks[0]).named_parameters()
    return {name: p.main_param.detach().clone() for name, p in named}  # type: ignore[attr-defined]


def once_rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What 8 bits leave of bf16 weights, on one rank: tensors that are one parameter there have one scale."""
    found = dict(weights)
    for joined in JOINED:
        for name in [name for name in weights if name.endswith(joined[0])]:
            names = [name.removesuffix(joined[0]) + suffix for suffix in joined]
            together = torch.cat([weights[each].bfloat16().flatten() for each in names])
            data, scale_inv = rounded(together)
            numbers = (data.view(torch.float8_e4m3fn).float() * scale_inv).bfloat16()
            parts = numbers.split([weights[each].numel() for each in names])
            found |= {each: part.view_as(weights[each]) for each, part in zip(names, parts, strict=True)}
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def kinds(folder: Path) -> list[dict[str, bool]]:
    with engine_of(folder) as engine:
        assert engine.reference is not None
        models = (engine.chunks[0], engine.reference.chunks[0])
        return [{name: is_float8tensor(p) for name, p in unwrap(model).named_parameters()} for model in models]


def test_weights_of_products_have_8_bits_and_no_others(folder: Path) -> None:
    ((policy, reference),) = run_ranks(1, kinds, folder)
    assert policy == reference
    small = {name for name, is_small in policy.items() if is_small}
    matrices = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert small == {name for name in policy if name.endswith(matrices)}
    assert len(small) == len(matrices) * SHAPE.num_hidden_layers


def training(folder: Path) -> list[bool]:
    """Beside the same in bf16, step by step: gradients are drawn, so the exact weights go the same way."""
    with engine_of(folder, products=None) as engine:
        plain = [(exact(engine), whole(engine))]
        drawn_step(engine, seed=1)
        plain.append((exact(engine), whole(engine)))
    with engine_of(folder) as engine:
        kept = [(exact(engine), whole(engine))]
        engine.offload()
        engine._offload.move_back()
        drawn_step(engine, seed=1)
        kept.append((exact(engine), whole(engine)))
    found = []
    for (exact_plain, plain_weights), (exact_kept, kept_weights) in zip(plain, kept, strict=True):
        found += [same(exact_plain, exact_kept), same(once_rounded(plain_weights), kept_weights)]
        found.append(not same(plain_weights, kept_weights))
    return [*found, not same(kept[0][1], kept[1][1])]


def test_the_optimizer_has_exact_weights_and_the_model_their_rounding(folder: Path) -> None:
    (found,) = run_ranks(1, training, folder)
    assert found == [True] * 7


def after(folder: Path, steps: int, layout: dict[str, int]) -> tuple[dict[str, Tensor], bool]:
    with engine_of(folder, **layout) as engine:
        for number in range(steps):
            drawn_step(engine, seed=number)
        found = whole(engine)
        return found, checksums(found.items()) == engine.weight_checksums()


def test_data_parallel_ranks_round_alike(folder: Path) -> None:
    ((alone, _),) = run_ranks(1, after, folder, 2, {})
    for found, arrived in run_ranks(2, after, folder, 2, {}):
        assert same(found, alone)
        assert arrived


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
def test_weights_leave_as_they_lie_in_any_layout(folder: Path, layout: dict[str, int]) -> None:
    """With tensor parallelism each rank's part has its own scale: not the same numbers, but no further from exact."""
    ((alone, _),) = run_ranks(1, after, folder, 0, {})
    (found, arrived), (other, _) = run_ranks(2, after, folder, 0, layout)
    assert arrived
    assert same(found, other)
    if "pipeline" in layout:
        assert same(found, alone)
    for name, weight in alone.items():  # half a step of four bits either way, and less than the least of either scale
        torch.testing.assert_close(found[name], weight, rtol=2**-3, atol=float(weight.abs().max()) * 2**-9)


def carried(folder: Path, written_by: str, read_by: str) -> list[bool]:
    """Whether a run goes on from the other's checkpoint as if it had been its own from the start."""
    with tempfile.TemporaryDirectory() as place:
        with engine_of(folder, products=PRODUCTS[read_by]) as engine:
            drawn_step(engine, seed=1)
            wanted = [whole(engine)]
            drawn_step(engine, seed=2)
            wanted.append(whole(engine))
        with engine_of(folder, products=PRODUCTS[written_by]) as engine:
            drawn_step(engine, seed=1)
            engine.begin_save(Path(place)).finish()
        with engine_of(folder, products=PRODUCTS[read_by]) as engine:
            engine.load(Path(place))
            found = [same(whole(engine), wanted[0])]
            drawn_step(engine, seed=2)
            return [*found, same(whole(engine), wanted[1])]


@pytest.mark.parametrize(("written_by", "read_by"), [("8 bits", "8 bits"), ("8 bits", "bf16"), ("bf16", "8 bits")])
def test_a_checkpoint_goes_on(folder: Path, written_by: str, read_by: str) -> None:
    assert run_ranks(1, carried, folder, written_by, read_by) == [[True, True]]


def following(folder: Path, averages: bool) -> list[bool]:  # noqa: FBT001  a rank's argument
    with engine_of(folder, averages_reference=averages) as engine, tempfile.TemporaryDirectory() as place:
        start = engine.reference_checksums() == engine.weight_checksums()
        drawn_step(engine, seed=1)
        apart = engine.reference_checksums() != engine.weight_checksums()
        if averages:
            engine.follow_policy(decay=0.5)
            apart &= engine.reference_checksums() != engine.weight_checksums()
        engine.save_reference(Path(place))
        saved = engine.reference_checksums()
        engine.follow_policy(decay=0.0)
        moved = engine.reference_checksums()
        engine.load_reference(Path(place))
        found = [start, apart, moved == engine.weight_checksums(), engine.reference_checksums() == saved]
    with engine_of(folder, averages_reference=averages) as engine, tempfile.TemporaryDirectory() as place:
        drawn_step(engine, seed=1)
        engine.begin_save(Path(place)).finish()  # as bf16 numbers, which the other way is on a GPU alone
        engine.load_reference(Path(place))
        return [*found, engine.reference_checksums() == engine.weight_checksums()]


@pytest.mark.parametrize("averages", [False, True])
def test_a_reference_follows_and_comes_back(folder: Path, averages: bool) -> None:  # noqa: FBT001  pytest's
    assert run_ranks(1, following, folder, averages) == [[True] * 5]
