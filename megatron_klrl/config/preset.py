"""What a preset is: settings of the sections ``kl`` and ``algorithm``, and whose they are. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_klrl.kl.catalogue import catalogue
from megatron_klrl.kl.config import KLConfig, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One preset.

    Attributes:
        name: recipe key ``preset: <name>``.
        origin: library or paper.
        summary: what it does, one line.
        kl: keys of the section kl.
        algorithm: keys of the section algorithm.
        flags: its own names and values, to the dotted keys here that they stand for (separated by spaces).
        differences: where this trainer does not do the same, one sentence each.
        conversion: how to turn its number for beta into one here; empty where the number means the same.
    """

    name: str
    origin: str
    summary: str
    kl: Mapping[str, object]
    algorithm: Mapping[str, object]
    flags: Mapping[str, str]
    differences: tuple[str, ...] = field(default=())
    conversion: str = ""

    def sections(self) -> dict[str, dict[str, object]]:
        """What goes under the recipe's own keys."""
        return {"kl": dict(self.kl), "algorithm": dict(self.algorithm)}

    def translation(self) -> dict[str, dict[str, object]]:
        """Its names, each with our dotted keys and their values; None for what is left to the recipe."""
        ours = {f"{section}.{key}": value for section, keys in self.sections().items() for key, value in keys.items()}
        return {theirs: {key: ours.get(key) for key in keys.split()} for theirs, keys in self.flags.items()}

    def kl_name(self) -> str:
        """``placement/estimator/credit/correction``, or ``off``."""
        return "off" if self.kl.get("beta") == 0 else KLConfig.model_validate(self.kl).name

    def verdicts(self) -> dict[str, str]:
        """The catalogue's verdict for each objective, or ``off``."""
        if self.kl.get("beta") == 0:
            return {objective.value: "off" for objective in Objective}
        (entry,) = [entry for entry in catalogue() if entry.name == self.kl_name()]
        return {objective.value: entry.verdict(objective).value for objective in Objective}
