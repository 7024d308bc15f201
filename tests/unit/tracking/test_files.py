"""metrics.jsonl, TensorBoard events and the run card."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_klrl.metrics.names import METRICS, PANELS, known, render_metrics
from megatron_klrl.tracking.card import Card
from megatron_klrl.tracking.console import RunConsole
from megatron_klrl.tracking.jsonl import MetricsFile
from megatron_klrl.tracking.tensorboard import TensorBoardWriter


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, keep_before=1)
    for step in (0, 1, 2, 3):
        first.write(step, {"reward/mean": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "rewa')  # killed in the middle of a line
    second = MetricsFile(path, keep_before=3)
    second.write(3, {"reward/mean": 30.0})
    second.close()
    assert steps(path) == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["reward/mean"] == 30.0


def test_a_fresh_run_does_not_keep_old_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, keep_before=1).close()
    assert path.read_text() == ""


def test_tensorboard_holds_the_scalars_and_the_text(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"reward/mean": 0.25})
    writer.write(2, {"reward/mean": 0.5})
    writer.text("card", "# Run card", step=2)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert any(tag.startswith("card") for tag in events.Tags()["tensors"])


def test_the_card_is_a_table_and_escapes_bars() -> None:
    text = Card(facts={"objective": "max E[R] - 0.1 KL(policy || reference)"}).render()
    assert "KL(policy \\|\\| reference)" in text
    assert "torch" in text


def test_every_panel_shows_metrics_that_exist() -> None:
    names = [metric.name.replace("<name>", "id") for metric in METRICS]
    for charts in PANELS.values():
        for patterns in charts.values():
            for pattern in patterns:
                assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_metric_names_are_unique_and_complete() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.unit and metric.meaning for metric in METRICS)
    assert known("eval/long/accuracy")
    assert not known("eval/long/acuracy")
    assert not known("reward/men")


def test_rows_without_a_terminal_are_plain_lines() -> None:
    console = Console(record=True, width=120, force_terminal=False)
    run = RunConsole(steps=2, console=console)
    with run.training(first_step=0):
        run.step(1, {"reward/mean": 0.5, "kl/exact": 0.25, "time/step_s": 1.0})
        run.evaluation(1, {"eval/id/accuracy": 0.5, "eval/id/stderr": 0.1})
        run.evaluation(2, {"eval/id/accuracy": 0.75, "eval/id/stderr": 0.1})
    text = console.export_text()
    assert "reward" in text
    assert "0.500" in text
    assert "id 0.750 (+0.25)" in text
    assert text.count("-") >= 1, "a metric that is not measured shows as a dash"


def test_on_a_terminal_what_libraries_write_to_stderr_stays_out_of_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    """rich's default moves it onto the screen, above the bar, past the log it was sent to."""
    console = Console(width=120, force_terminal=True)
    run = RunConsole(steps=2, console=console)
    with run.phase("start"):
        sys.stderr.write("chatter\n")
    with run.training(first_step=0):
        sys.stderr.write("chatter\n")
        run.step(1, {"reward/mean": 0.5})
    out, err = capfd.readouterr()
    assert err.count("chatter") == 2
    assert "chatter" not in out
    assert "start: " in out
    assert "0.500" in out


def test_the_metrics_page_is_the_one_the_code_makes() -> None:
    """Make it again: write what ``megatron_klrl.metrics.names.render_metrics()`` returns."""
    page = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
    assert page.read_text() == render_metrics()
