"""``klrl doctor``: what is installed, what works here, and what to do about the rest."""

import json
from collections import Counter
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from megatron_klrl.cli.diagnosis import Finding, Level, diagnose
from megatron_klrl.cli.options import JsonOption, TracebackOption
from megatron_klrl.cli.reporting import errors_reported

_STYLE = {Level.OK: "green", Level.WARN: "yellow", Level.ERROR: "bold red"}


def doctor(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """Check versions, devices and known bad pairs; exit code 1 if something has to be repaired.

    Example: klrl doctor --json
    """
    with errors_reported(traceback=traceback):
        findings = diagnose()
        if as_json:
            typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        else:
            _print_table(findings)
        if any(finding.level is Level.ERROR for finding in findings):
            raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        level = f"[{_STYLE[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.name, finding.found, finding.advice)
    console = Console()
    console.print(table)
    counts = Counter(finding.level for finding in findings)
    console.print(", ".join(f"{counts[level]} {level}" for level in Level))
