"""``klrl audit``: the exact expected gradient of every KL configuration, as two tables or JSON."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from megatron_klrl.cli.audit_plot import plot_audit
from megatron_klrl.cli.options import JsonOption, PlotOption
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.kl.audit import TOLERANCE, AuditReport, AuditRow, Measurement, run_audit
from megatron_klrl.kl.config import Objective
from megatron_klrl.kl.expectation import Verdict

_PIPED_WIDTH = 100
_PICTURES = (".png", ".pdf", ".svg")
_VERDICT_WORDS = {
    Verdict.UNBIASED: "[green]yes[/]",
    Verdict.UNBIASED_ON_POLICY: "[yellow]on-policy[/]",
    Verdict.BIASED: "[red]no[/]",
    Verdict.ZERO: "[red]zero[/]",
}
_LEGEND = """seq, tok: error of the expected gradient of the KL term, relative to the exact gradient of the
sequence-level and of the token-level KL; 0 means equal to rounding. Off-policy, tok is against the
nearer of two: prefixes visited by the policy, or by the policy that sampled (JSON has both).
var: variance of one sample's gradient. follows: does it follow that objective; zero: on average it
does nothing. both: full beta on each side."""
_EFFECTS_LEGEND = """scale: how much of the intended gradient arrives (1 is right). off: what points elsewhere (0 is
right). beta: what the stated 0.3 amounts to. share: visited tokens that a clamp or clip touches."""


def audit(
    json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Exact expected gradient of every KL configuration, against the sequence- and the token-level objective.

    Example: klrl audit --json --plot audit.png

    Raises:
        UserError: the picture's folder or format does not exist.
        WorkError: a claim of the catalogue does not hold.
    """
    if plot is not None:
        _check_picture(plot)
    report = run_audit()
    if plot is not None:
        plot_audit(report, plot)
    if json:
        typer.echo(report.to_json())
    else:
        _print_tables(report)
    if report.failures():
        raise WorkError(f"the catalogue's claims do not hold for: {', '.join(report.failures())}")


def _check_picture(file: Path) -> None:
    """Before the work, not after it."""
    if file.suffix not in _PICTURES:
        raise UserError(f"{file} is no picture file", field="--plot", fix=f"end its name in {', '.join(_PICTURES)}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"there is no folder {file.parent}", field="--plot", fix="make it, or name another")


def _print_tables(report: AuditReport) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(_problem_line(report))
    console.print(_rows_table(report))
    console.print(_LEGEND, highlight=False)
    console.print()
    console.print(_effects_table(report))
    console.print(_EFFECTS_LEGEND, highlight=False)
    if not report.failures():
        console.print(f"all {len(report.rows)} configurations are as the catalogue says (tolerance {TOLERANCE:g})")


def _problem_line(report: AuditReport) -> str:
    problem = report.problem
    return (
        f"{problem['responses']} responses to {problem['prompts']} prompts, {problem['parameters']} shared parameters; "
        f"KL(policy||reference) {problem['kl_policy_reference']:.3f} nats, "
        f"KL(rollout||policy) {problem['kl_rollout_policy']:.3f} nats"
    )


def _rows_table(report: AuditReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("placement/estimator/credit/\ncorrection", no_wrap=True)
    for sampling in ("on", "off"):
        for number in ("seq", "tok", "var"):
            table.add_column(f"{sampling}\n{number}", justify="right", no_wrap=True)
    for objective in Objective:
        table.add_column(f"follows\n{objective}", no_wrap=True)
    for row in report.rows:
        table.add_row(row.entry.name, *_numbers(row.on_policy), *_numbers(row.off_policy), *_verdicts(row))
    return table


def _numbers(measurement: Measurement) -> tuple[str, str, str]:
    prefixes = (measurement.token_policy_prefixes, measurement.token_rollout_prefixes)
    token_error = min(comparison.relative_error for comparison in prefixes)
    return _error(measurement.sequence.relative_error), _error(token_error), f"{measurement.variance:.2f}"


def _error(value: float) -> str:
    return "0" if value <= TOLERANCE else f"{value:.2f}"


def _verdicts(row: AuditRow) -> tuple[str, ...]:
    return tuple(_VERDICT_WORDS[row.measured_verdict(objective)] for objective in Objective)


def _effects_table(report: AuditReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("what is done around the KL")
    table.add_column("target")
    for name in ("group", "scale", "off", "beta", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in report.effects:
        table.add_row(
            effect.practice,
            effect.target,
            "" if effect.group_size is None else str(effect.group_size),
            f"{effect.scale:.2f}",
            _error(effect.off_direction),
            "" if effect.effective_beta is None else f"{effect.effective_beta:.2f}",
            "" if effect.fraction is None else f"{effect.fraction:.0%}",
        )
    return table
