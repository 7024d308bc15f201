"""The life of the reference: when it is reset or follows the policy, and which weights it is."""

from pathlib import Path

from megatron_klrl.errors import UserError
from megatron_klrl.loop.parts import Parts
from megatron_klrl.weight_sync.checksum import digest


def checksum(parts: Parts) -> str:
    """Of the reference's weights, whatever the layout; empty where there is none. Collective."""
    return digest(parts.trainer.reference_checksums()) if parts.recipe.has_reference else ""


def check(parts: Parts, folder: Path, wanted: str) -> None:
    """The reference is the one that a checkpoint was written with; collective.

    Raises:
        UserError: it is another: a resumed run would silently pursue another objective.
    """
    found = checksum(parts)
    if wanted and found != wanted:
        raise UserError(
            f"the reference has checksum {found}, the run in {folder} was held to {wanted}",
            field="model.path" if parts.recipe.reference.path is None else "reference.path",
            fix="resume with the weights that the run was started with",
        )


def after_step(parts: Parts, *, step: int) -> bool:
    """Move the reference where the recipe says so; whether it did. Collective."""
    reference = parts.recipe.reference
    if reference.ema is not None:
        parts.trainer.follow_policy(decay=reference.ema)
        return True
    if reference.reset_every and step % reference.reset_every == 0:
        parts.trainer.follow_policy(decay=0.0)
        return True
    return False
