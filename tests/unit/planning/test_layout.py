from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klrl.planning.layout import Layout, candidates, problem
from megatron_klrl.planning.model import PlannedModel, read_model
from tests.unit.planning.configs import DEEPSEEK_V3, QWEN3_235B, QWEN25_7B, write


@pytest.fixture
def dense(tmp_path: Path) -> PlannedModel:
    return read_model(str(write(tmp_path / "dense", QWEN25_7B)))


@pytest.fixture
def deepseek(tmp_path: Path) -> PlannedModel:
    return read_model(str(write(tmp_path / "deepseek", DEEPSEEK_V3)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tensor": 8}, "parallel.tensor"),  # 28 heads
        ({"tensor": 7}, "parallel.tensor"),  # 4 key-value heads
        ({"pipeline": 3}, "parallel.pipeline"),
        ({"pipeline": 2, "virtual": 4}, "parallel.virtual_pipeline"),
        ({"virtual": 2}, "parallel.virtual_pipeline"),
        ({"expert": 2}, "parallel.expert"),
        ({"engine_tensor": 8}, "generation.tensor"),
        ({"context": 3}, "parallel"),
        ({"sequence": True}, "parallel.sequence"),
    ],
)
def test_impossible_layouts_name_the_key(dense: PlannedModel, changes: dict[str, int], field: str) -> None:
    assert problem(Layout(gpus=8), dense) is None
    found = problem(replace(Layout(gpus=8), **changes), dense)
    assert found is not None
    assert found.field == field


def test_experts_with_tensor_parallelism_need_sequence_parallelism(tmp_path: Path) -> None:
    model = read_model(str(write(tmp_path / "m", QWEN3_235B)))
    layout = Layout(gpus=16, tensor=4, expert=16)
    refused = problem(layout, model)
    assert refused is not None
    assert refused.field == "parallel.sequence"
    assert problem(replace(layout, sequence=True), model) is None


def test_every_candidate_is_possible_and_named_once(dense: PlannedModel) -> None:
    found = list(candidates(dense, gpus=8))
    assert len(found) == len(set(found)) > 50
    assert all(problem(layout, dense) is None for layout in found)
    assert {layout.tensor for layout in found} == {1, 2, 4}
    assert {layout.data * layout.tensor * layout.pipeline * layout.context for layout in found} == {8}


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 7)])
def test_stages_hold_every_layer_once(dense: PlannedModel, pipeline: int, virtual: int) -> None:
    layout = Layout(gpus=pipeline, pipeline=pipeline, virtual=virtual)
    counts = [sum(count for _, count in layout.kinds(dense, stage)) for stage in range(pipeline)]
    assert counts == [28 // pipeline] * pipeline


def test_a_prime_number_of_layers_leaves_one_stage(deepseek: PlannedModel) -> None:
    assert {layout.pipeline for layout in candidates(deepseek, gpus=64)} == {1}


def test_layers_without_experts_lie_on_the_first_stage(deepseek: PlannedModel) -> None:
    model = replace(deepseek, layers=60)
    assert Layout(gpus=4, pipeline=4).kinds(model, 0) == [(0, 3), (59, 12)]
    assert Layout(gpus=4, pipeline=4).kinds(model, 1) == [(59, 15)]
    assert Layout(gpus=2, pipeline=2, virtual=30).kinds(model, 0) == [(0, 2), (59, 28)]
    assert Layout(gpus=2, pipeline=2, virtual=30).kinds(model, 1) == [(0, 1), (59, 29)]
