"""Model and optimizer on disk, through Megatron's distributed checkpoints: loadable in another layout."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_klrl.errors import UserError
from megatron_klrl.mcore.compat import torch_adam_finish_load, torch_adam_prepare_load
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.model import unwrap


def save(folder: Path, model: Any, optimizer: Any, *, groups: ProcessGroups) -> None:
    """Write this job's model and optimizer; collective. The folder must exist and be empty."""
    dist_checkpointing.save(_sharded(model, optimizer, groups, is_loading=False), str(folder))


def load(folder: Path, model: Any, optimizer: Any, *, groups: ProcessGroups) -> None:
    """Fill model and optimizer from a checkpoint of any layout; collective.

    Raises:
        UserError: the folder is not a checkpoint of this model.
    """
    torch_adam_prepare_load(optimizer)
    loaded = _read(folder, _sharded(model, optimizer, groups, is_loading=True))
    unwrap(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch_adam_finish_load(optimizer)


def load_model(folder: Path, model: Any, *, groups: ProcessGroups) -> None:
    """Fill a model alone."""
    loaded = _read(folder, {"model": unwrap(model).sharded_state_dict(metadata=_metadata(groups))})
    unwrap(model).load_state_dict(loaded["model"])


def _read(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "metadata.json").exists():
        raise UserError(f"{folder} is not a checkpoint", field="checkpoint", fix="name a step_* folder of a run")
    try:
        loaded: Any = dist_checkpointing.load(wanted, str(folder))
    except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not load: {error}", field="checkpoint", fix="use a complete checkpoint of the same model"
        ) from error
    return loaded


def _sharded(model: Any, optimizer: Any, groups: ProcessGroups, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata(groups)
    tensors = unwrap(model).sharded_state_dict(metadata=metadata)
    return {
        "model": tensors,
        "optimizer": optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=metadata),
    }


def _metadata(groups: ProcessGroups) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # loads under another data-parallel size
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }
