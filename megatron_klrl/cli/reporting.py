"""How errors reach the user: one message on standard error and an exit code; a traceback only when asked for."""

import sys
import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.runtime.place import described


def tell(message: str) -> None:
    """One message to the user on standard error."""
    typer.echo(f"klrl: {message}", err=True)


@contextmanager
def errors_reported(*, traceback: bool = False) -> Iterator[None]:
    """Turn `UserError` into exit code 2 and `WorkError` into exit code 1; other exceptions pass: they are bugs.

    Args:
        traceback: also show where it was raised.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except (UserError, WorkError) as error:
        if traceback:
            sys.stderr.write(tracebacks.format_exc())
        tell(described(error) if isinstance(error, WorkError) else str(error))
        raise typer.Exit(error.exit_code) from None
