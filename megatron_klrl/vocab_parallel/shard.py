"""Where one rank's columns lie in the vocabulary, and what the shards tell each other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds.

    Attributes:
        start: vocabulary index of the first local column.
        size: number of local columns that are real tokens; columns after them are padding and carry no probability.
        group: ranks that together hold the vocabulary; None means this rank holds all of it (the oracle).
    """

    start: int
    size: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def whole(vocab_size: int) -> "VocabShard":
        """The single-rank definition that every sharded result must equal."""
        return VocabShard(start=0, size=vocab_size)

    def gather(self, value: Tensor) -> Tensor:
        """Every shard's value in rank order, ``[shards, *value.shape]``; the same on every rank, not differentiable."""
        if self.group is None:
            return value.unsqueeze(0)
        ranks = dist.get_world_size(self.group)
        parts = value.new_empty(ranks * value.numel())  # flat: gloo and NCCL differ in the shapes that they take
        dist.all_gather_into_tensor(parts, value.flatten(), group=self.group)
        return parts.view(ranks, *value.shape)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each label (0 where it lies elsewhere), and whether it lies here."""
        inside = (labels >= self.start) & (labels < self.start + self.size)
        return torch.where(inside, labels - self.start, 0), inside
