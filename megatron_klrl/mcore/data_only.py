"""Reading a checkpoint runs none of its content.

torch's distributed checkpoints pickle their index (``.metadata``), and load what is not a tensor with
``weights_only=False``: whoever wrote the folder could run code in whoever reads it. While a checkpoint is read, the
index goes through an unpickler that knows the classes of an index and no others, and torch is told to load data only.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch.distributed.checkpoint.filesystem as torch_files

_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.serialization reads it at every load, and it outranks the argument
_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # the plan of the save, which torch 2.13 keeps in the index too
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}


class NotDataError(Exception):
    """A checkpoint names something that is not data."""


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX.get(module, ()):
            raise NotDataError(f"its index names {module}.{name}, which no checkpoint has; it was not run")
        return super().find_class(module, name)


def _load(file: IO[bytes]) -> Any:
    return _IndexUnpickler(file).load()


def read_index(folder: Path) -> Any:
    """The index of a checkpoint. torch passes over whatever is wrong with it, and later misses it.

    Raises:
        NotDataError: it is none.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            return _load(file)
    except NotDataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise NotDataError(f"its index cannot be read ({type(error).__name__})") from error


@contextmanager
def data_only() -> Iterator[None]:
    """Nothing that torch or Megatron read from a checkpoint in the body is executed."""
    module: Any = torch_files
    original, switch = module.pickle, os.environ.get(_SWITCH)
    module.pickle = SimpleNamespace(load=_load, dump=pickle.dump)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        module.pickle = original
        if switch is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = switch
