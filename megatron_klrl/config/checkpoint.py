"""The section checkpoint of a recipe: which checkpoints stay, and what a damaged one does to a resume."""

from enum import StrEnum

from megatron_klrl.config.fields import Flag, Positive, Section, Text


class Fallback(StrEnum):
    """What --resume does where the newest checkpoint is damaged."""

    NONE = "none"
    PREVIOUS = "previous"


class CheckpointSection(Section):
    """What becomes of checkpoints; loop.checkpoint_every says when one is written."""

    keep: Positive | None = None
    """Newest checkpoints that stay, beside the best one and the one that the run was resumed from; none: all stay."""
    keep_best: Text | None = None
    """Metric by whose highest value one more stays, such as eval/<name>/accuracy or reward/mean; a checkpoint counts
    with what was measured in its own step. Needs keep."""
    asynchronous: Flag = False
    """Files are written while the next steps train, from a copy of model and optimizer in host memory."""
    fallback: Fallback = Fallback.NONE
    """--resume where the newest checkpoint is damaged: none refuses, previous takes the newest one that is whole."""
