"""The frozen model that the policy is held to, and the ways in which it follows the policy after all."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klrl.mcore import checkpoint
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.model import unwrap
from megatron_klrl.mcore.quantised import numbers


class Reference:
    """This rank's part of the reference.

    Attributes:
        chunks: what forward passes run through.
    """

    def __init__(self, chunks: Sequence[Any], *, exact: Sequence[Any] | None) -> None:
        """Take the chunks.

        Args:
            chunks: in the trainer's number format.
            exact: the same in float32, where an average of many steps is kept: a bfloat16 weight does not see steps of
                less than a 256th of itself. None where the chunks are exact themselves, or never averaged.
        """
        self.chunks = list(chunks)
        self._kept = self.chunks if exact is None else list(exact)

    @torch.no_grad()
    def follow(self, policy: Sequence[Any], *, decay: float) -> None:
        """``reference = decay * reference + (1 - decay) * policy``, parameter by parameter; 0 copies the policy.

        Args:
            policy: chunks of the same layout.
            decay: in [0, 1).
        """
        for target, source in _pairs(self._kept, policy):
            if decay == 0:
                target.copy_(numbers(source))
            else:
                target.lerp_(numbers(source).to(target.dtype), 1 - decay)
        if self._kept is not self.chunks:
            for target, source in _pairs(self.chunks, self._kept):
                target.copy_(source)

    def save(self, folder: Path, *, groups: ProcessGroups) -> None:
        """Write the weights to an existing, empty folder; collective."""
        checkpoint.save_model(folder, self._kept, groups=groups)

    @torch.no_grad()
    def load(self, folder: Path, *, groups: ProcessGroups) -> None:
        """Read the weights back, from any layout; collective."""
        checkpoint.load_model(folder, self._kept, groups=groups)
        if self._kept is not self.chunks:
            for target, source in _pairs(self.chunks, self._kept):
                target.copy_(source)


def _pairs(targets: Sequence[Any], sources: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for target, source in zip(targets, sources, strict=True):
        mine, theirs = dict(unwrap(target).named_parameters()), dict(unwrap(source).named_parameters())
        if mine.keys() != theirs.keys():
            raise ValueError(f"policy and reference differ in {sorted(mine.keys() ^ theirs.keys())[:3]}")
        yield from ((mine[name], theirs[name]) for name in mine)
