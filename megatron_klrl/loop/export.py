"""Weights to a Hugging Face folder."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from megatron_klrl.errors import UserError

_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")


def write_hf_folder(weights: Iterable[tuple[str, Tensor]], *, source: Path, to: Path, writes: bool) -> None:
    """Write weights with the configuration and tokenizer files of the folder they came from; collective.

    Args:
        weights: Hugging Face-named full tensors; every rank consumes them.
        source: the folder the model was loaded from.
        to: new or empty folder.
        writes: whether this rank writes (one does).

    Raises:
        UserError: ``to`` exists and is not empty.
    """
    if writes and to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty", field="--to", fix="name a new folder")
    kept = {}
    for name, tensor in weights:
        if writes:
            kept[name] = tensor.detach().cpu().clone()
    if not writes:
        return
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, to / file.name)
    save_torch_state_dict(kept, to)
