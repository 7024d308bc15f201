"""Models that travel inside the package."""

from importlib.resources import files
from pathlib import Path

from megatron_klrl.errors import UserError


def embedded_model(name: str) -> Path:
    """Hugging Face folder of a shipped model; recipes write `embedded:NAME`.

    Raises:
        UserError: no model of that name is shipped.
    """
    # Path, not Traversable: transformers and vLLM read folders; a package inside a zip file is not supported by either.
    root = Path(str(files(__package__)))
    known = sorted(config.parent.name for config in root.glob("*/config.json"))
    if name not in known:
        choices = ", ".join(f"embedded:{model}" for model in known)
        fix = f"use {choices}, or the path of a Hugging Face folder"
        raise UserError(f"no model {name!r} is embedded", field="model.path", fix=fix)
    return root / name
