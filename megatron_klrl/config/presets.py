"""Presets by name, and their page. Imports no torch.

A preset fills the sections ``kl`` and ``algorithm``; keys written beside it win. It never sets ``kl.allow_biased``: a
preset whose KL is biased for its stated objective is refused until the user accepts that.
"""

import difflib

from megatron_klrl.config.preset import Preset
from megatron_klrl.config.preset_table import PRESETS, READ_AT
from megatron_klrl.errors import UserError

__all__ = ["PRESETS", "Preset", "find_preset", "render_presets"]


def find_preset(name: object) -> Preset:
    """The preset of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    by_name = {preset.name: preset for preset in PRESETS}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(str(name), by_name, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(by_name)}"
    raise UserError(f"there is no preset {name!r}", field="preset", fix=f"{fix} (klrl config presets lists them)")


_PAGE = f"""# Presets

Made by `megatron_klrl.config.presets.render_presets()`; do not edit.

`preset: <name>` in a recipe, or `preset=<name>` on the command line, fills the sections `kl` and `algorithm` with what
another trainer or a paper uses. Keys written beside it win: a preset in the file gives way to the file's keys and to
the command line; a preset on the command line replaces what the file says and gives way to the command line's other
keys. `config.yaml` of a run keeps the name and all resolved settings.

Verdicts are the catalogue's ([catalogue.md](catalogue.md)): does the KL term follow the gradient of the sequence-level,
or of the token-level, KL? `off`: beta is 0 and no reference is loaded. A preset that is biased for the objective it
states does not start until `kl.allow_biased=true`; the message names the nearest configuration that is not.

Beta weighs nats of the stated objective here and passes through no standard deviation, whitening or mean over tokens.
`kl.beta` is the library's number all the same; where the library divides it, the preset says how to convert it. With
the advantage `grpo` the reward, there as here, is in standard deviations of its group, and beta weighs nats against
those.

Libraries as read at: {READ_AT}.

| preset | from | KL | beta | advantage, aggregation | sequence | token |
|---|---|---|---|---|---|---|
"""

_LEFT_OUT = """
## Left out

| what | why |
|---|---|
| PPO with a critic (default of verl and OpenRLHF) | there is no critic in this version, and no baseline here is one |
| KL in GRPO's reward (verl, SkyRL `use_kl_in_reward`) | divided by the group's deviation: another weight per prompt |
| whitened KL (NeMo-RL REINFORCE++, OpenRLHF `reinforce`) | its weight differs from batch to batch |
| prime-rl | its penalty is towards the policy that sampled, not towards a reference |
| ROLL `kl_penalty: full` | sums over time, not over the vocabulary |
| the paper's asynchronous study | sets `loop.max_staleness` too: examples/recipes/countdown_qwen3_4b.yaml |
"""


def render_presets() -> str:
    """The presets as the Markdown of docs/kl/presets.md."""
    rows = "".join(_row(preset) for preset in PRESETS)
    return _PAGE + rows + "".join(_chapter(preset) for preset in PRESETS) + _LEFT_OUT


def _row(preset: Preset) -> str:
    cells = [
        f"`{preset.name}`",
        preset.origin,
        f"`{preset.kl_name()}`",
        _beta(preset),
        f"{preset.algorithm['advantage']}, {preset.algorithm['aggregation']}",
        *preset.verdicts().values(),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _beta(preset: Preset) -> str:
    beta = preset.kl.get("beta")
    return "the recipe's" if beta is None else f"{beta:g}"


def _chapter(preset: Preset) -> str:
    lines = [f"\n## `{preset.name}`\n", f"{preset.origin}: {preset.summary}.\n", "| there | here |", "|---|---|"]
    for theirs, ours in preset.translation().items():
        here = ", ".join(f"`{key}`" if value is None else f"`{key}={value}`" for key, value in ours.items())
        lines.append(f"| {theirs.replace('|', chr(92) + '|')} | {here} |")
    if preset.differences:
        lines += ["", *(f"- {sentence}" for sentence in preset.differences)]
    if preset.conversion:
        lines += ["", f"Beta: {preset.conversion}"]
    return "\n".join(lines) + "\n"
