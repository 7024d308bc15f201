"""Model and optimizer on disk, through Megatron's distributed checkpoints: loadable in another layout."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from megatron_klrl.errors import UserError
from megatron_klrl.mcore.compat import (
    keep_bucket_padding,
    take_weights_of,
    torch_adam_finish_load,
    torch_adam_prepare_load,
    whole_numbers,
)
from megatron_klrl.mcore.data_only import NotDataError, data_only, read_index
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.model import unwrap
from megatron_klrl.mcore.writing import Writing, causes, write

_FP8_STATE = "_extra_state"
"""End of the keys under which Transformer Engine keeps the numbers of delayed scaling, and nothing under any other.

They are not written: Megatron's local layers have none, a checkpoint must load in either kind, and the numbers are
found again within a few passes."""

_APART = 1
"""Key of the experts' optimizer state, which Megatron keeps apart where experts are split over ranks."""


def save(folder: Path, chunks: Sequence[Any], optimizer: Any, *, groups: ProcessGroups) -> None:
    """Write this job's model and optimizer; collective. The folder must exist and be empty.

    Raises:
        OSError: a rank could not write its part; on every rank.
    """
    write(folder, _sharded(chunks, optimizer, groups, is_loading=False))


def begin_save(folder: Path, chunks: Sequence[Any], optimizer: Any, *, groups: ProcessGroups) -> Writing:
    """The same from copies, while the caller goes on; collective."""
    return Writing(folder, _sharded(chunks, optimizer, groups, is_loading=False))


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, *, groups: ProcessGroups) -> None:
    """Fill model and optimizer from a checkpoint of any layout; collective.

    Raises:
        UserError: the folder is not a checkpoint of this model.
    """
    torch_adam_prepare_load(optimizer)
    wanted = _sharded(chunks, optimizer, groups, is_loading=True)
    loaded = _read(folder, wanted)
    if (_APART in loaded["optimizer"]) != (_APART in wanted["optimizer"]):
        was, now = ("several ranks", "one") if _APART in loaded["optimizer"] else ("one rank", "several")
        raise UserError(
            f"{folder} was written with all experts of a layer on {was}, this layout has them on {now}",
            field="parallel.expert",
            fix="resume with an expert parallelism of the same kind (1, or more than 1); klrl export reads either",
        )
    _fill(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    torch_adam_finish_load(optimizer)
    take_weights_of(optimizer)


def save_model(folder: Path, chunks: Sequence[Any], *, groups: ProcessGroups) -> None:
    """Write a model alone; collective. The folder must exist and be empty.

    Raises:
        OSError: as for ``save``.
    """
    write(folder, _sharded_chunks(chunks, groups))


def load_model(folder: Path, chunks: Sequence[Any], *, groups: ProcessGroups) -> None:
    """Fill a model alone."""
    _fill(chunks, _read(folder, _sharded_chunks(chunks, groups)))


def _fill(chunks: Sequence[Any], loaded: dict[str, Any]) -> None:
    for name, chunk in _named(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        lost = [key for key in missing if not key.endswith(_FP8_STATE)]
        if lost or unexpected:
            raise ValueError(f"the checkpoint's state is not the model's: {lost + unexpected}")


def _read(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "metadata.json").exists():
        raise UserError(f"{folder} is not a checkpoint", field="checkpoint", fix="name a step_* folder of a run")
    try:
        read_index(folder)
        with data_only():
            loaded: Any = dist_checkpointing.load(wanted, str(folder), sharded_strategy=whole_numbers())
    except CheckpointException as error:
        raise _unusable(folder, causes(error)) from error
    except (
        dist_checkpointing.core.CheckpointingException,
        NotDataError,
        UnpicklingError,
        KeyError,
        RuntimeError,
    ) as error:
        raise _unusable(folder, str(error)) from error
    return loaded


def _unusable(folder: Path, why: str) -> UserError:
    first = why.split("\n", 1)[0]
    fix = "use a complete checkpoint of the same model"
    return UserError(f"{folder} does not load: {first}", field="checkpoint", fix=fix)


def _named(chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    """Chunks of an interleaved pipeline are told apart by their place in the state, not by the names of tensors."""
    return [("model" if len(chunks) == 1 else f"model{number}", chunk) for number, chunk in enumerate(chunks)]


def _sharded_chunks(chunks: Sequence[Any], groups: ProcessGroups) -> dict[str, Any]:
    return {name: _tensors(unwrap(chunk), groups) for name, chunk in _named(chunks)}


def _tensors(chunk: Any, groups: ProcessGroups) -> dict[str, Any]:
    state = chunk.sharded_state_dict(metadata=_metadata(groups))
    return {key: value for key, value in state.items() if not key.endswith(_FP8_STATE)}


def _sharded(chunks: Sequence[Any], optimizer: Any, groups: ProcessGroups, *, is_loading: bool) -> dict[str, Any]:
    keep_bucket_padding(optimizer)
    tensors = _sharded_chunks(chunks, groups)
    whole = tensors["model"] if len(chunks) == 1 else tensors
    return {
        **tensors,
        "optimizer": optimizer.sharded_state_dict(whole, is_loading=is_loading, metadata=_metadata(groups)),
    }


def _metadata(groups: ProcessGroups) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # loads under another data-parallel size
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }
