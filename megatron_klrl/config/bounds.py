"""Bounds that surrogates and mismatch corrections take, their defaults, and what they were set to. Imports no torch.

A default depends on what it bounds, so the recipe says none where it means this table.
"""

from collections.abc import Mapping

from megatron_klrl.config.algorithm import AlgorithmSection, MismatchCorrection, MismatchSection, Surrogate

Bounds = Mapping[str, float | None]

CLIPS: Mapping[Surrogate, Bounds] = {
    Surrogate.REINFORCE: {},
    # arXiv 1707.06347; the dual clip is off, 3 in arXiv 1912.09729
    Surrogate.PPO_CLIP: {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    # arXiv 2507.18071, section 5.1
    Surrogate.GSPO: {"clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585 has no lower bound and names no upper one; a weight of 5 is that of arXiv 2510.13786
    Surrogate.CISPO: {"clip_low": 1.0, "clip_high": 4.0},
}
"""Bounds by surrogate: exactly those it takes."""

WEIGHT_RANGES: Mapping[MismatchCorrection, Bounds] = {
    MismatchCorrection.NONE: {},
    # Yao et al. 2025
    MismatchCorrection.TOKEN_TRUNCATE: {"high": 2.0},
    # arXiv 2510.18855
    MismatchCorrection.TOKEN_MASK: {"low": 0.5, "high": 5.0},
    # as for tokens
    MismatchCorrection.PREFIX_TRUNCATE: {"high": 2.0},
    # Liu, Li et al. 2025; masked from above alone
    MismatchCorrection.SEQUENCE_TRUNCATE: {"high": 2.0},
    MismatchCorrection.SEQUENCE_MASK: {"low": 0.0, "high": 2.0},
}
"""Ranges by correction: exactly those it takes."""


def clip_bounds(algorithm: AlgorithmSection) -> dict[str, float | None]:
    """The bounds of a recipe's surrogate."""
    return _resolved(CLIPS[algorithm.surrogate], algorithm)


def weight_range(mismatch: MismatchSection) -> dict[str, float | None]:
    """The range of a recipe's mismatch correction."""
    return _resolved(WEIGHT_RANGES[mismatch.correction], mismatch)


def _resolved(defaults: Bounds, section: AlgorithmSection | MismatchSection) -> dict[str, float | None]:
    given = {name: getattr(section, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in given.items()}
