"""``klrl study``."""

import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from megatron_klrl.cli.options import JsonOption, TracebackOption
from megatron_klrl.cli.rank import rank_place
from megatron_klrl.cli.reporting import errors_reported, tell
from megatron_klrl.cli.run_dir import RUNS
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.study import StudyFile, load_study
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.study.plan import PlannedRun, Shard, parse_shard, plan_runs


def study(  # noqa: PLR0913  each is an option of the command
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML study.", show_default=False)],
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at the same time.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the study.", show_default="runs/STUDY")] = None,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Only every N-th run, from the I-th: for job arrays.")
    ] = "0/1",
    report: Annotated[bool, typer.Option("--report", help="Only make the report of what is there.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Also repeat runs that ended without a result.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run, list them, start nothing.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Run a grid of configurations and seeds, and compare them; goes on where it was stopped.

    Example: klrl study examples/studies/tour_cpu.yaml --jobs 2
    """
    with errors_reported(traceback=traceback):
        if rank_place() is not None:
            fix = "start it once, without torchrun; --shard I/N divides it over machines"
            raise UserError("a study starts its own ranks", field="klrl study", fix=fix)
        folder = out or RUNS / study.stem
        part = parse_shard(shard)
        content = load_study(study)
        if not as_json:
            typer.echo(f"klrl study: {study.stem}: checking every run -> {folder}")
        runs = plan_runs(content, study, check=_Checker())
        if dry_run:
            _print_plan(runs, part, folder, as_json=as_json)
            return
        if not report:
            _work(content, part.of(runs), folder, jobs=jobs, retry=retry, as_json=as_json)
        _report(content, study, runs, folder, as_json=as_json)


class _Checker:
    """What `klrl train` checks before it starts; warnings are said once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, recipe: Recipe) -> int:
        """Check a recipe; how many ranks it takes."""
        from megatron_klrl.cli.preparation import check

        ranks, warnings = check(recipe, place=None)
        for warning in warnings:
            if warning not in self._warned:
                tell(f"warning: {warning}")
            self._warned.add(warning)
        return ranks


def _print_plan(runs: Sequence[PlannedRun], part: Shard, folder: Path, *, as_json: bool) -> None:
    from megatron_klrl.config.describe import kl_text, kl_verdict

    mine = {run.name for run in part.of(runs)}
    rows = [
        {
            "run": run.name,
            "ranks": run.ranks,
            "steps": run.recipe.loop.steps,
            "kl": kl_text(run.recipe),
            "verdict": kl_verdict(run.recipe),
            "in_shard": run.name in mine,
        }
        for run in runs
    ]
    if as_json:
        typer.echo(json.dumps({"out": str(folder), "runs": rows}, indent=2))
        return
    width = max(len(run.name) for run in runs)
    for row in rows:
        mark = "" if row["in_shard"] else "  (another shard's)"
        typer.echo(f"{row['run']:<{width}}  {row['steps']} steps, {row['ranks']} rank(s), KL {row['kl']}{mark}")
    typer.echo(f"{len(mine)} of {len(runs)} runs; dry run: nothing was started")


def _work(
    content: StudyFile, runs: Sequence[PlannedRun], folder: Path, *, jobs: int, retry: bool, as_json: bool
) -> None:
    from megatron_klrl.cli.study_progress import StudyProgress
    from megatron_klrl.study.crew import Crew, Todo
    from megatron_klrl.study.folder import Outcome, Start, Status, look
    from megatron_klrl.tracking.card import commit, machine, versions

    folder.mkdir(parents=True, exist_ok=True)
    found = {run.name: look(folder / run.name, run.recipe, retry=retry) for run in runs}
    todos = [Todo(run=run, start=found[run.name]) for run in runs if found[run.name] is not Start.NOTHING]
    counted = Counter(found.values())
    if not as_json:
        resumed = f", {counted[Start.RESUME]} from a checkpoint" if counted[Start.RESUME] else ""
        typer.echo(f"{len(runs)} runs: {counted[Start.NOTHING]} have ended before, {len(todos)} to do{resumed}")
    progress = StudyProgress(folder, [todo.run for todo in todos], finished=counted[Start.NOTHING], quiet=as_json)
    facts = Outcome(
        status=Status.DONE, message="", seconds=0, command="", commit=commit(), versions=versions(), machine=machine()
    )
    crew = Crew(out=folder, jobs=jobs, facts=facts, keep_weights=content.keep_weights, observer=progress)
    with progress.shown(), _terminated_like_interrupted():
        crew.work(todos)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A job's end by SIGTERM takes the workers down as Ctrl-C does; the next start goes on."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(content: StudyFile, file: Path, runs: Sequence[PlannedRun], folder: Path, *, as_json: bool) -> None:
    from megatron_klrl.study.report import write_report
    from megatron_klrl.study.results import read_results

    results = read_results(folder, runs, collapse_below=content.collapse_below)
    ended = [result for result in results if result.outcome is not None]
    if not ended:
        raise WorkError(f"no run of {file} has ended in {folder}: there is nothing to report")
    written = write_report(content, file, results, folder)
    wrong = [result for result in ended if not result.is_result]
    if as_json:
        counts = Counter(str(result.outcome.status) for result in ended if result.outcome)
        facts = {"out": str(folder), "report": str(written), "runs": len(results), "ended": dict(counts)}
        typer.echo(json.dumps(facts, indent=2))
    else:
        missing = len(results) - len(ended)
        typer.echo(f"report  {written}" + (f" ({missing} runs have not ended)" if missing else ""))
    if wrong:
        names = ", ".join(result.run.name for result in wrong[:3])
        text = f"{len(wrong)} runs ended without a result ({names}{', ...' if len(wrong) > 3 else ''})"
        raise WorkError(f"{text}; the report says why; --retry repeats them")
