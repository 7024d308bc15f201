"""When weight updates are verified, and what counts as agreement."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Dtype
from megatron_klrl.loop.refit import BOUNDS, Agreement, due, refit

RECIPE = Path(__file__).parents[3] / "examples" / "recipes" / "arithmetic_cpu.yaml"


@pytest.mark.parametrize(("every", "expected"), [(3, [1, 3, 6, 9]), (0, [1]), (1, list(range(1, 10)))])
def test_the_first_update_and_every_so_many_are_verified(every: int, expected: list[int]) -> None:
    recipe = load_recipe(RECIPE, [f"generation.verify_every={every}"])
    assert [n for n in range(1, 10) if due(recipe, version=n, first=n == 1)] == expected


def test_a_resumed_run_verifies_at_the_same_versions() -> None:
    recipe = load_recipe(RECIPE, ["generation.verify_every=4"])
    whole = [n for n in range(1, 13) if due(recipe, version=n, first=n == 1)]
    resumed = [n for n in range(7, 13) if due(recipe, version=n, first=False)]
    assert resumed == [n for n in whole if n >= 7]


@pytest.mark.parametrize("dtype", Dtype)
def test_agreement_bounds_the_mean_and_the_largest(dtype: Dtype) -> None:
    mean, largest = bounds = BOUNDS[dtype]
    assert Agreement(tokens=9, mean=mean, largest=largest).within(bounds)
    assert not Agreement(tokens=9, mean=2 * mean, largest=largest).within(bounds)
    assert not Agreement(tokens=9, mean=mean, largest=2 * largest).within(bounds)
    assert not Agreement(tokens=9, mean=float("nan"), largest=float("nan")).within(bounds)


def test_an_engine_that_slept_gets_weights_between_its_two_kinds_of_memory() -> None:
    calls: list[str] = []
    engine = SimpleNamespace(
        wake=lambda memory: calls.append(f"wake {memory}"),
        update_weights=lambda weights, *, version, verify: calls.append(
            f"update to {version}: {list(weights)} {verify}"
        ),
    )
    parts: Any = SimpleNamespace(engine=engine, trainer=SimpleNamespace(export_weights=lambda: iter(["w"])))
    assert refit(parts, version=3, verify=False) == {}
    assert calls == ["wake weights", "update to 3: ['w'] False", "wake kv_cache"]
