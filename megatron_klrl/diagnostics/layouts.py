"""Short names of layouts, like ``tp2pp2`` or ``cp2-packed``, and the recipes they stand for."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Dtype, PrecisionSection, Recipe, Recompute
from megatron_klrl.errors import UserError

ONE_RANK = "one"
_SIZES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vp": "virtual_pipeline",
    "cp": "context",
    "dp": "data",
    "ep": "expert",
}
_PART = re.compile(r"(?P<name>tp|pp|vp|cp|dp|ep|mb)(?P<size>[1-9]\d*)|(?P<word>sp|packed|recompute)")
_HELP = "parts are tp2 pp2 vp2 (chunks of a stage) cp2 dp2 ep2 sp mb4 (rows of a microbatch) packed recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLayout:
    """One layout to look at.

    Attributes:
        name: as the user wrote it.
        ranks: it takes.
        recipe: the user's, in this layout, in float32.
    """

    name: str
    ranks: int
    recipe: Recipe


def named_layout(name: str, recipe: Recipe, *, longest_row: int) -> NamedLayout:
    """What a name stands for; all that it does not say is one rank, padded rows, nothing computed twice.

    Args:
        name: parts in any order, with or without dashes; ``one`` for one rank.
        recipe: of the user.
        longest_row: tokens of the longest sequence to come; a pack takes at least two.

    Raises:
        UserError: not a name of a layout.
    """
    parts = _parts(name)
    sizes = {key: int(parts.get(key, 1)) for key in _SIZES}
    parallel: dict[str, Any] = {field: sizes[key] for key, field in _SIZES.items() if key != "dp"}
    parallel["sequence"] = "sp" in parts
    row_step = 2 * sizes["cp"]
    rows: dict[str, Any] = {"tokens_per_microbatch": None}
    if "packed" in parts:
        rows = {"micro_batch_size": None, "tokens_per_microbatch": 2 * (-(-longest_row // row_step) * row_step)}
    elif "mb" in parts:
        rows["micro_batch_size"] = int(parts["mb"])
    ranks = sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"]
    if ranks % (sizes["pp"] * sizes["ep"]):
        ranks *= sizes["ep"]
    updates = {
        "parallel": parallel,
        "loop": rows,
        "memory": {"recompute": Recompute.FULL if "recompute" in parts else Recompute.NONE},
        "generation": {"tensor": 1},
        "launch": {"ranks": ranks},
    }
    changed: dict[str, Any] = {
        name: getattr(recipe, name).model_copy(update=update) for name, update in updates.items()
    }
    changed["precision"] = PrecisionSection(dtype=Dtype.FP32)
    return NamedLayout(name=name, ranks=ranks, recipe=recipe.model_copy(update=changed))


def default_layouts(shape: ModelShape) -> tuple[str, ...]:
    """Every kind of layout once, on at most four ranks."""
    names = ("mb1", "packed", "recompute", "tp2", "tp2sp", "pp2", "pp2vp2", "cp2", "cp2-packed", "dp2", "tp2pp2")
    if shape.experts is None:
        return names
    return ("mb1", "packed", "recompute", "tp2sp", "pp2", "pp2vp2", "cp2", "cp2-packed", "dp2", "tp2sppp2", "ep2")


def _parts(name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in [] if name == ONE_RANK else name.split("-"):
        matches = list(_PART.finditer(piece))
        if "".join(match.group() for match in matches) != piece or not piece:
            raise UserError(f"{name!r} is not a layout", field="--layouts", fix=f"{_HELP}; for example tp2pp2-packed")
        for match in matches:
            found[match["name"] or match["word"]] = match["size"] or ""
    return found
