"""``klrl``: the commands, and nothing heavy, so that ``klrl --help`` answers at once."""

from typing import Annotated

import typer

from megatron_klrl import __version__
from megatron_klrl.cli import check, config, launch
from megatron_klrl.cli.doctor import doctor
from megatron_klrl.cli.eval import evaluate
from megatron_klrl.cli.export import export
from megatron_klrl.cli.options import JsonOption, PlotOption, TracebackOption
from megatron_klrl.cli.plan import plan_run
from megatron_klrl.cli.reporting import errors_reported
from megatron_klrl.cli.study import study
from megatron_klrl.cli.study_worker import study_worker
from megatron_klrl.cli.train import train

app = typer.Typer(
    name="klrl",
    help="Reinforcement learning for language models, with the KL term done right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(export)
app.command()(study)
app.command("study-worker", hidden=True)(study_worker)
app.command("plan")(plan_run)
app.command()(doctor)
app.add_typer(check.app, name="check")
app.add_typer(config.app, name="config")
app.add_typer(launch.app, name="launch")


@app.command()
def audit(as_json: JsonOption = False, plot: PlotOption = None, traceback: TracebackOption = False) -> None:
    """Exact expected gradient of every KL configuration, against the objectives.

    Example: klrl audit --plot audit.png
    """
    with errors_reported(traceback=traceback):
        from megatron_klrl.cli.audit import audit as run_audit

        run_audit(json=as_json, plot=plot)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version  # the callback has dealt with it


def main() -> None:
    """Entry point of the console script; ends the process with the command's exit code."""
    app()


if __name__ == "__main__":
    main()
