"""A save that goes on while its caller does something else: copies first, files in a thread, the index at the end.

Megatron plans a save, writes the files and collects what was written as three steps. Only the second takes long and
needs no other rank, so it alone runs beside the training. Megatron's own way forks or starts a process for it: here
beside an engine and its threads, and on CPU with the live tensors, which the next update changes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from megatron_klrl.mcore.compat import write_in_this_process
from megatron_klrl.mcore.quantised import numbers


class Writing:
    """A checkpoint that is being written from copies in host memory."""

    def __init__(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Copy the tensors and start; collective. The folder must exist and be empty."""
        write_in_this_process()
        request: Any = dist_checkpointing.save(
            dict(state), str(folder), async_sharded_save=True, async_strategy="mcore"
        )
        self._last_steps: Sequence[Callable[[], None]] = request.finalize_fns
        self._thread: threading.Thread | None = None
        if request.async_fn is not None:  # this rank has something to write
            rank, buckets, results = request.async_fn_args
            self._thread = threading.Thread(
                target=request.async_fn, args=(rank, _copied(buckets), results), name="checkpoint"
            )
            self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are; ``finish`` then takes no longer than the other ranks do."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the files of all ranks and write the index; collective.

        Raises:
            OSError: a rank could not write its part; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            for step in self._last_steps:
                step()
        except CheckpointException as error:  # no Exception, so nothing further out would report it
            raise OSError(causes(error) or "another rank has the reason") from error


def _copied(buckets: Sequence[Any]) -> list[Any]:
    """The same plan over tensors of its own: the next update changes the live ones."""
    return [
        (file, key, (data, [(item, numbers(tensor).to("cpu", copy=True)) for item, tensor in tensors]))
        for file, key, (data, tensors) in buckets
    ]


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """The same at once, without copies; collective.

    Raises:
        OSError: as for ``Writing.finish``.
    """
    write_in_this_process()
    try:
        dist_checkpointing.save(dict(state), str(folder))
    except CheckpointException as error:
        raise OSError(causes(error) or "another rank has the reason") from error


def causes(error: CheckpointException) -> str:
    """What went wrong, by rank; empty on a rank that was only told that something did."""
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
