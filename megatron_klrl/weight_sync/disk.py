"""Through a folder of safetensors files that every rank reaches; it stays, for engines in other jobs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_klrl.weight_sync.plan import Bucket
from megatron_klrl.weight_sync.transport import Transport

_INDEX = "model.safetensors.index.json"


class Disk:
    """Another transport brings a bucket together, one rank writes it, all read it back.

    After the last bucket the folder's weights are those of a Hugging Face folder, with an index. A file appears under
    its name when it is complete.
    """

    def __init__(self, group: dist.ProcessGroup, *, inner: Transport, folder: Path, buckets: int) -> None:
        """Take the folder.

        Args:
            group: ranks that exchange.
            inner: brings buckets together.
            folder: exists, on a file system that all of them share.
            buckets: of the plan: the index is written after so many.
        """
        self._group, self._inner, self._folder, self._buckets = group, inner, folder, buckets
        self._number = 0
        self._files: dict[str, str] = {}

    def collect(self, bucket: Bucket, parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Transport.collect``."""
        whole = self._inner.collect(bucket, parts)
        self._number = self._number % self._buckets + 1
        file = self._folder / f"model-{self._number:05d}-of-{self._buckets:05d}.safetensors"
        self._files |= {name: file.name for name, _ in whole}
        if self._group.rank() == 0:
            self._write(file, whole)
        dist.barrier(self._group)
        read = load_file(file)
        device = whole[0][1].device
        found = [(name, read[name].to(device)) for name, _ in whole]
        dist.barrier(self._group)  # nobody overwrites in the next round what somebody still reads
        return found

    def close(self) -> None:
        """Close the inner transport; the folder stays."""
        self._inner.close()

    def _write(self, file: Path, whole: list[tuple[str, Tensor]]) -> None:
        partial = file.with_suffix(".partial")
        save_file({name: tensor.contiguous().cpu() for name, tensor in whole}, partial, metadata={"format": "pt"})
        os.replace(partial, file)
        if self._number == self._buckets:
            index = {"metadata": {}, "weight_map": self._files}
            (self._folder / _INDEX).write_text(json.dumps(index, indent=2))
