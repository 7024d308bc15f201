"""From a study file to its runs: a folder name, a seed and a resolved recipe each. Imports no torch."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.study import Axis, StudyFile, Value
from megatron_klrl.errors import UserError

SEED_KEY = "loop.seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        name: of its folder below the study's: cell, grid values, seed.
        cell: of the study file.
        point: recipe keys of the grid and their values here.
        seed: of the run.
        recipe: resolved.
        ranks: processes it takes.
    """

    name: str
    cell: str
    point: Mapping[str, Value]
    seed: int
    recipe: Recipe
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Every ``count``-th run, starting at ``index``.

    Attributes:
        index: from 0.
        count: of shards.
    """

    index: int
    count: int

    def of(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """This shard's runs."""
        return list(runs[self.index :: self.count])


def parse_shard(text: str) -> Shard:
    """``I/N`` as `Shard`.

    Raises:
        UserError: it is not that.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        fix = "give I/N with I from 0 to N - 1, for example 0/4"
        raise UserError(f"{text!r} is not a shard", field="--shard", fix=fix)
    return Shard(index=int(index), count=int(count))


Check = Callable[[Recipe], int]
"""Raises `UserError` for a recipe that cannot run; otherwise says how many ranks it takes."""


def plan_runs(study: StudyFile, file: Path, *, check: Check) -> list[PlannedRun]:
    """Every run of a study, all cells with the first seed before any with the second.

    Args:
        study: the file's content.
        file: where it lies; its recipe is beside it.
        check: of each recipe.

    Raises:
        UserError: a cell's recipe cannot run; names the cell.
    """
    labels = _labels(study)
    found = []
    for seed in study.seeds:
        for cell, section in study.cells.items():
            for point in _points(study.grid if section.grid is None else section.grid):
                overrides = [*study.overrides, *section.overrides, *_as_overrides(point), f"{SEED_KEY}={seed}"]
                parts = [cell, *(_part(labels[key], value) for key, value in point.items()), f"seed={seed}"]
                where = "/".join(parts[:-1])
                recipe, ranks = _checked(file.parent / study.recipe, overrides, where=where, check=check)
                run = PlannedRun(name="/".join(parts), cell=cell, point=point, seed=seed, recipe=recipe, ranks=ranks)
                found.append(run)
    return found


def _checked(recipe: Path, overrides: Sequence[str], *, where: str, check: Check) -> tuple[Recipe, int]:
    try:
        resolved = load_recipe(recipe, overrides)
        return resolved, check(resolved)
    except UserError as error:
        field = error.field or "recipe"
        raise UserError(f"{field}: {error.problem}", field=f"cell {where}", fix=error.fix) from error


def _points(grid: Mapping[str, Axis]) -> Iterator[dict[str, Value]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _as_overrides(point: Mapping[str, Value]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def _part(label: str, value: Value) -> str:
    return f"{label}={value}".replace("/", "+")  # a path as value is one folder, not several


def _labels(study: StudyFile) -> dict[str, str]:
    """The last part of each grid key, where that names one key only.

    Raises:
        UserError: the seed is one of them.
    """
    keys = dict.fromkeys(key for grid in (study.grid, *(c.grid or {} for c in study.cells.values())) for key in grid)
    if SEED_KEY in keys:
        raise UserError("is a grid of seeds", field=f"grid.{SEED_KEY}", fix="write them under seeds")
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}
