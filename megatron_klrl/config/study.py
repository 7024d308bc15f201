"""A study file: a recipe, named cells of overrides, grids that are crossed with them, seeds."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from megatron_klrl.config.explain import explain
from megatron_klrl.config.fields import Count, Flag, Section, SetName, Share, Text
from megatron_klrl.config.load import read_mapping

Value = bool | int | float | str
Axis = tuple[Value, ...]


class CellSection(Section):
    """One way to train."""

    overrides: tuple[Text, ...] = ()
    """Recipe overrides, key=value, after those of the study."""
    grid: dict[Text, Axis] | None = None
    """In place of the study's grid; {} for a cell to which none of it applies."""


class StudyFile(Section):
    """What a study runs: every cell at every point of its grid with every seed."""

    recipe: Text
    """Recipe that all runs start from; a path beside this file."""
    overrides: tuple[Text, ...] = ()
    """Recipe overrides of all runs, key=value."""
    cells: dict[SetName, CellSection] = Field(min_length=1)
    """What is compared, by name."""
    grid: dict[Text, Axis] = Field(default_factory=dict)
    """Recipe keys and the values that each cell is run at, crossed; after the cell's overrides."""
    seeds: tuple[Count, ...] = Field(min_length=1)
    """loop.seed of the repetitions, over which intervals are taken."""
    keep_weights: Flag = False
    """Keep the checkpoints and the Hugging Face folder of finished runs; otherwise they are removed."""
    collapse_below: Share = 0.5
    """A run counts as collapsed where its accuracy in distribution ends below this share of the untouched model's, or
    where it diverged."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names a seed twice, which would repeat a run")
        grids = {"grid": self.grid} | {f"cells.{name}.grid": cell.grid or {} for name, cell in self.cells.items()}
        for name, grid in grids.items():
            for key, values in grid.items():
                if not values or len(set(values)) < len(values):
                    raise ValueError(f"{name}.{key}: {list(values)} is empty or names a value twice")
        return self


def load_study(file: Path) -> StudyFile:
    """Read a study file.

    Raises:
        UserError: no such file, not YAML, a key unknown, or a value of the wrong type; names the key and the fix.
    """
    raw: dict[str, Any] = read_mapping(file)
    try:
        return StudyFile.model_validate(raw)
    except ValidationError as error:
        raise explain(error, raw, root=StudyFile) from error
