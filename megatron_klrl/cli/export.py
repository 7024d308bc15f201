"""``klrl export``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_klrl.cli.options import JsonOption, TracebackOption
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.errors import UserError


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="New folder for the Hugging Face model.", show_default=False)],
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder that transformers and vLLM load.

    Example: klrl export runs/first/checkpoints/100 --to exported/first
    """
    with errors_reported(traceback=traceback):
        if not checkpoint.is_dir():
            fix = "give a folder under checkpoints/ of a run directory"
            raise UserError(f"there is no folder {checkpoint}", field="CHECKPOINT", fix=fix)
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise UserError(f"{to} exists and is not an empty folder", field="--to", fix="give a new folder")
        from megatron_klrl.jobs import export_checkpoint

        export_checkpoint(checkpoint, to)
        text = json.dumps({"checkpoint": str(checkpoint), "to": str(to)}) if as_json else f"klrl export: wrote {to}"
        typer.echo(text)
