"""``klrl study-worker``: what ``klrl study`` starts, once for each of its jobs. Not for people."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_klrl.cli.rank import rank_place
from megatron_klrl.launch.local import run_ranks


def study_worker(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of the worker; holds a recipe.")],
    ranks: Annotated[int, typer.Option("--ranks", help="Processes of this worker.")] = 1,
) -> None:
    """Take runs from standard input, one after the other.

    Example: klrl study starts this itself
    """
    if ranks > 1 and rank_place() is None:
        command = ["study-worker", str(folder), "--ranks", str(ranks)]
        raise typer.Exit(run_ranks(command, ranks, folder))
    from megatron_klrl.study.worker import serve

    # What libraries print must not reach the study; what they print in C neither.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(folder, orders=sys.stdin, replies=replies)
