"""The presets: what papers and other trainers do, in this trainer's words. Imports no torch."""

from megatron_klrl.config.preset import Preset
from megatron_klrl.config.preset_table.libraries import LIBRARIES, READ_AT
from megatron_klrl.config.preset_table.papers import PAPERS

__all__ = ["PRESETS", "READ_AT"]

PRESETS: tuple[Preset, ...] = (*PAPERS, *LIBRARIES)
"""Papers first."""
