"""Study files and planned runs for tests that start no engine."""

from pathlib import Path

import yaml

from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.study import load_study
from megatron_klrl.study.plan import PlannedRun, plan_runs

BASE = Path(__file__).parents[3] / "examples" / "studies" / "base_cpu.yaml"


def study_file(folder: Path, **sections: object) -> Path:
    """A study of two cells at two betas with two seeds, or what `sections` say instead."""
    content = {
        "recipe": str(BASE),
        "overrides": ["loop.steps=4"],
        "cells": {"none": {"overrides": ["kl.beta=0"], "grid": {}}, "k1": {}},
        "grid": {"kl.beta": [0.1, 0.3]},
        "seeds": [0, 1],
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**content, **sections}, sort_keys=False))
    return file


def planned(file: Path) -> list[PlannedRun]:
    """Its runs, unchecked, a rank each."""
    return plan_runs(load_study(file), file, check=one_rank)


def one_rank(_recipe: Recipe) -> int:
    """What a recipe takes."""
    return 1
