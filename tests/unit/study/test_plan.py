from pathlib import Path
from typing import Any

import pytest

from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.study import load_study
from megatron_klrl.errors import UserError
from megatron_klrl.study.plan import Shard, parse_shard, plan_runs
from tests.unit.cli.programs import klrl_here
from tests.unit.study.studies import one_rank, planned, study_file


def test_cells_are_crossed_with_grids_and_seeds(tmp_path: Path) -> None:
    runs = planned(study_file(tmp_path))
    assert [run.name for run in runs] == [
        "none/seed=0",
        "k1/beta=0.1/seed=0",
        "k1/beta=0.3/seed=0",
        "none/seed=1",
        "k1/beta=0.1/seed=1",
        "k1/beta=0.3/seed=1",
    ]
    assert [run.recipe.kl.beta for run in runs] == [0.0, 0.1, 0.3] * 2
    assert [run.recipe.loop.seed for run in runs] == [0] * 3 + [1] * 3
    assert {run.recipe.loop.steps for run in runs} == {4}
    assert runs[2].point == {"kl.beta": 0.3}


def test_a_cell_overrides_the_study_and_a_grid_overrides_the_cell(tmp_path: Path) -> None:
    cells = {"a": {"overrides": ["loop.steps=9", "kl.beta=9"]}}
    (first, *_) = planned(study_file(tmp_path, cells=cells))
    assert (first.recipe.loop.steps, first.recipe.kl.beta) == (9, 0.1)


def test_keys_of_one_last_part_keep_their_whole_name(tmp_path: Path) -> None:
    grid = {"kl.beta": [0.1], "data.train.terms": [3], "loop.steps": [2], "kl_control.steps": [3]}
    file = study_file(tmp_path, cells={"a": {}}, grid={key: grid[key] for key in ("loop.steps", "kl_control.steps")})
    (run, *_) = planned(file)
    assert run.name == "a/loop.steps=2/kl_control.steps=3/seed=0"


def test_shards_share_the_runs(tmp_path: Path) -> None:
    runs = planned(study_file(tmp_path))
    parts = [Shard(index=index, count=4).of(runs) for index in range(4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0"])
def test_a_wrong_shard_is_the_users(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard: .* Fix: give I/N with I from 0 to N - 1"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"seed": [0]}, "seed: unknown key. Fix: did you mean seeds?"),
        ({"cells": {"a": {"override": []}}}, "cells.a.override: unknown key. Fix: did you mean cells.a.overrides?"),
        ({"cells": {}}, "cells: "),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"grid": {"kl.beta": []}}, "is empty or names a value twice"),
        ({"grid": {"loop.seed": [1]}}, "write them under seeds"),
        (
            {"cells": {"a": {"overrides": ["kl.bta=1"]}}},
            "cell a/beta=0.1: kl.bta: unknown key. Fix: did you mean kl.beta",
        ),
        ({"recipe": "nope.yaml"}, "nope.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(tmp_path: Path, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(study_file(tmp_path, **sections))
    assert expected in str(caught.value)


def test_every_cell_is_checked_before_anything_runs(tmp_path: Path) -> None:
    seen: list[float] = []

    def check(recipe: Recipe) -> int:
        seen.append(recipe.kl.beta)
        if recipe.kl.beta == 0.3:
            raise UserError("is too large", field="kl.beta", fix="set it to 0.1")
        return one_rank(recipe)

    file = study_file(tmp_path)
    with pytest.raises(UserError, match=r"cell k1/beta=0.3: kl.beta: is too large. Fix: set it to 0.1"):
        plan_runs(load_study(file), file, check=check)
    assert seen == [0.0, 0.1, 0.3]


def test_a_dry_run_lists_the_runs_of_the_shard_and_starts_nothing(tmp_path: Path) -> None:
    done = klrl_here("study", study_file(tmp_path), "--dry-run", "--shard", "1/3", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "klrl study: small: checking every run -> runs/small"
    assert [line.endswith("(another shard's)") for line in lines[1:7]] == [True, False, True] * 2
    assert lines[-1] == "2 of 6 runs; dry run: nothing was started"
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.yaml"]


def test_a_biased_cell_is_refused_by_name(tmp_path: Path) -> None:
    file = study_file(tmp_path, cells={"k3": {"overrides": ["kl.estimator=k3"]}})
    done = klrl_here("study", file, "--dry-run", cwd=tmp_path)
    assert done.exit_code == 2
    assert "klrl: cell k3/beta=0.1: kl: " in done.stderr
    assert "kl.allow_biased=true" in done.stderr
