"""Plans by hand, and how they move; what is measured is in tests/mcore/test_memory_plan.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe, Recompute
from megatron_klrl.errors import UserError
from megatron_klrl.planning.hardware import choose
from megatron_klrl.planning.layout import Layout, of_recipe
from megatron_klrl.planning.memory import in_flight
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import LayoutPlan, Request, fitting, least, plan, request
from megatron_klrl.planning.render import host_lines
from tests.unit.config.folders import make_recipe
from tests.unit.planning.configs import DEEPSEEK_V3, QWEN3_235B, QWEN25_7B, write

GIB = 2**30


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    """One of a size that GPUs are for."""
    large = [
        "precision.dtype=bf16",
        "generation.max_tokens=2048",
        "generation.max_model_len=2560",
        "loop.prompts_per_step=128",
        "loop.group_size=8",
    ]
    return load_recipe(make_recipe(tmp_path), [*large, *overrides])


def wanted(tmp_path: Path, config: dict[str, Any], *overrides: str, gpu: str = "h200") -> Request:
    model = read_model(str(write(tmp_path / "model", config)))
    return request(recipe(tmp_path, *overrides), model, hardware=choose(gpu, []), prompt=256)


def parts(found: LayoutPlan, phase: str) -> dict[str, int]:
    (one,) = [one for one in found.memory if one.name == phase]
    return dict(one.parts)


def test_weights_gradients_and_adam_by_hand(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN25_7B, "generation.kv_cache_mib=1024")
    numbers = asked.model.parameters
    found = parts(plan(asked, Layout(gpus=8)), "generate")
    assert found["weights"] == found["reference"] == 2 * numbers
    assert found["gradients"] == 4 * numbers
    assert found["optimizer"] == 12 * (-(-numbers // 8))
    assert found["engine weights"] == 2 * numbers
    assert found["key-value cache"] == GIB


def test_a_reference_costs_only_what_it_is(tmp_path: Path) -> None:
    layout = Layout(gpus=8)
    assert "reference" not in parts(plan(wanted(tmp_path, QWEN25_7B, "kl.beta=0"), layout), "train")
    followed = wanted(tmp_path, QWEN25_7B, "reference.ema=0.99")
    assert parts(plan(followed, layout), "train")["reference"] == 6 * followed.model.parameters


def test_the_cache_holds_all_that_is_decoded_at_once(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN25_7B, "generation.max_num_seqs=64")
    found = parts(plan(asked, Layout(gpus=8)), "generate")
    assert found["key-value cache"] == 64 * (256 + 2048) * 28 * 2 * 4 * 128 * 2
    cut = parts(plan(asked, Layout(gpus=8, engine_tensor=4)), "generate")
    assert cut["key-value cache"] * 4 == found["key-value cache"]


@pytest.mark.parametrize(("key", "phase", "part"), [
    ("generation.sleep=true", "train", "engine weights"),
    ("generation.sleep=true", "sync", "key-value cache"),
    ("memory.offload_while_generating=true", "generate", "optimizer"),
    ("memory.offload_while_generating=true", "sync", "gradients"),
])  # fmt: skip
def test_what_is_given_back_is_not_counted(tmp_path: Path, key: str, phase: str, part: str) -> None:
    layout = Layout(gpus=8)
    assert part in parts(plan(wanted(tmp_path, QWEN25_7B), layout), phase)
    assert part not in parts(plan(wanted(tmp_path, QWEN25_7B, key), layout), phase)


def test_the_host_holds_what_is_offloaded(tmp_path: Path) -> None:
    stays, goes = (
        plan(wanted(tmp_path, QWEN25_7B, f"memory.offload_while_generating={value}"), Layout(gpus=16))
        for value in ("false", "true")
    )
    assert (stays.host_bytes, host_lines(stays, choose("h200", []))) == (0, [])
    share = 12 * -(-wanted(tmp_path, QWEN25_7B).model.parameters // 16)
    assert goes.host_bytes == share
    for ranks in (8, 4):
        assert host_lines(goes, choose("h200", [f"gpus_per_node={ranks}"])) == [
            f"on the host while generating: {share / GIB:.1f} GiB of a rank, {ranks * share / GIB:.1f} GiB of a node"
        ]


def test_experts_are_spread_over_expert_ranks(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN3_235B)
    layout = Layout(gpus=64, expert=64)
    dense = asked.model.parameters - asked.model.expert_parameters
    found = parts(plan(asked, layout), "train")
    assert found["weights"] == 2 * (dense + asked.model.expert_parameters // 64)
    assert found["optimizer"] == 12 * (-(-dense // 64) + asked.model.expert_parameters // 64)


def test_memory_moves_the_way_it_must(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN25_7B, "loop.tokens_per_microbatch=16384")

    def activations(**changes: Any) -> int:
        found = parts(plan(asked, replace(Layout(gpus=8), **changes)), "train")
        return found["activations"]

    plain = activations()
    assert activations(recompute=Recompute.FULL) < activations(recompute=Recompute.ATTENTION) < plain
    assert activations(tensor=2, sequence=True) < activations(tensor=2) < plain
    assert activations(context=2) < 0.55 * plain
    # the first stage holds as many microbatches as there are stages: half of the layers, twice
    assert activations(pipeline=2) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "microbatches", "expected"),
    [(1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 0, 2, 2), (4, 2, 0, 8, 11), (4, 2, 3, 8, 5)],
)
def test_microbatches_alive(pipeline: int, virtual: int, stage: int, microbatches: int, expected: int) -> None:
    """Interleaved: Megatron's warm-up, 2 (stages after this one) + (chunks - 1) stages, and the one at work."""
    layout = Layout(gpus=pipeline, pipeline=pipeline, virtual=virtual)
    assert in_flight(layout, stage, microbatches) == expected


def test_layouts_that_fit_are_possible_and_in_order(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN25_7B, "loop.micro_batch_size=4", "generation.sleep=true")
    found = fitting(asked, gpus=8, memory_bytes=131 * GIB)
    assert found
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert max(one.peak.total for one in found) <= 128 * GIB
    fewer = fitting(asked, gpus=8, memory_bytes=60 * GIB)
    assert {one.layout for one in fewer} < {one.layout for one in found}
    smallest = least(asked, gpus=8)
    assert smallest is not None
    assert smallest.peak.total == min(one.peak.total for one in found)


def test_a_model_of_671_billion_on_a_thousand_gpus(tmp_path: Path) -> None:
    asked = wanted(tmp_path, DEEPSEEK_V3, "loop.micro_batch_size=1", "generation.sleep=true")
    found = fitting(asked, gpus=1024, memory_bytes=131 * GIB)
    assert found
    assert all(one.layout.engine_tensor >= 16 for one in found), "1.34 TB of bf16 do not fit fewer"
    assert not fitting(asked, gpus=16, memory_bytes=131 * GIB)


def test_compute_follows_the_operations(tmp_path: Path) -> None:
    asked = wanted(tmp_path, QWEN25_7B)
    found = plan(asked, Layout(gpus=8))
    times = {phase.name: phase for phase in found.times}
    products = 2 * asked.model.active_parameters * asked.work.tokens
    scores = asked.work.sequences * asked.model.attention_flops(256 + 2048)
    assert times["score"].parts["compute"] == pytest.approx(2 * (products + scores) / (8 * 989e12 * 0.4))
    assert times["train"].parts["compute"] == pytest.approx(3 * (products + scores) / (8 * 989e12 * 0.4))
    assert times["generate"].bottleneck == "memory bandwidth"
    assert found.seconds == sum(phase.seconds for phase in found.times)


def test_sampling_waits_for_the_longest_response(tmp_path: Path) -> None:
    """Responses half as long on average as allowed: the other half of the steps, one sequence beside the weights."""
    model = read_model(str(write(tmp_path / "model", QWEN25_7B)))
    settings = ("generation.max_tokens=2048", "generation.max_num_seqs=64")
    asked = [
        request(recipe(tmp_path, *settings), model, hardware=choose("h200", []), prompt=256, response=response)
        for response in (2048, 1024)
    ]
    whole, half = ({one.name: one for one in plan(one, Layout(gpus=8)).times}["generate"].parts for one in asked)
    bytes_per_s = 4.8e12 * 0.6
    cache = 2 * 28 * 4 * 128 * 2  # keys and values of a token, in bf16
    waves = -(-asked[0].recipe.loop.prompts_per_step * asked[0].recipe.loop.group_size // (8 * 64))
    weights = 2 * model.parameters
    assert whole["memory bandwidth"] == pytest.approx(
        waves * 2048 * (weights + 64 * (256 + 1024) * cache) / bytes_per_s
    )
    assert half["memory bandwidth"] == pytest.approx(
        (waves * 1024 * (weights + 64 * (256 + 512) * cache) + 1024 * (weights + (256 + 1536) * cache)) / bytes_per_s
    )


def test_fp8_needs_hardware_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"precision.fp8: is tensorwise, but a100 has no FP8"):
        wanted(tmp_path, QWEN25_7B, "precision.fp8=tensorwise", gpu="a100")
    plain, rounded = (wanted(tmp_path, QWEN25_7B, f"precision.fp8={name}") for name in ("none", "tensorwise"))
    times = [{one.name: one for one in plan(asked, Layout(gpus=8)).times} for asked in (plain, rounded)]
    ratio = times[0]["train"].parts["compute"] / times[1]["train"].parts["compute"]
    assert ratio == pytest.approx(1979 / 989)


def test_what_8_bits_take_and_save(tmp_path: Path) -> None:
    """Of the policy's layers along rows and columns, of the reference's along rows; embedding and output stay bf16."""
    layout, fp8 = Layout(gpus=8), "precision.fp8=tensorwise"
    asked = {
        "copies": wanted(tmp_path, QWEN25_7B, fp8),
        "primary": wanted(tmp_path, QWEN25_7B, fp8, "precision.fp8_primary_weights=true"),
        "inner": wanted(
            tmp_path, QWEN25_7B, fp8, "precision.fp8_primary_weights=true", "precision.first_last_bf16=true"
        ),
    }
    model = asked["copies"].model
    layers = model.parameters - 2 * model.vocab * model.hidden - model.hidden
    rest = model.parameters - layers
    found = {name: parts(plan(one, layout), "score") for name, one in asked.items()}
    assert found["copies"]["weights"] == 2 * model.parameters
    assert found["copies"]["fp8 copies of weights"] == 2 * layers
    assert found["copies"]["reference"] == 2 * model.parameters + layers
    assert found["primary"]["weights"] == 2 * rest
    assert found["primary"]["fp8 weights"] == 2 * layers
    assert found["primary"]["reference"] == 2 * rest + layers
    inner = layers // 28 * 26
    assert found["inner"]["fp8 weights"] == 2 * inner
    assert found["inner"]["weights"] == 2 * (model.parameters - inner)


def test_the_recipes_own_layout(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "parallel.tensor=4", "parallel.sequence=true", "generation.tensor=2")
    assert of_recipe(asked, gpus=16) == Layout(gpus=16, tensor=4, sequence=True, engine_tensor=2)
