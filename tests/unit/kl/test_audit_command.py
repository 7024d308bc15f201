import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from megatron_klrl.cli.audit import audit
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.kl import run_audit

_APP = typer.Typer()
_APP.command()(audit)


def test_tables_fit_a_hundred_columns_and_name_every_configuration():
    result = CliRunner().invoke(_APP, [])

    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 100
    assert "reward/exact/sequence/sequence" in result.output
    assert "all 119 configurations are as the catalogue says" in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("loss/k1/token/none")]
    assert line.split()[-2:] == ["zero", "zero"]


def test_json_is_nothing_but_json():
    result = CliRunner().invoke(_APP, ["--json"])

    assert result.exit_code == 0
    assert json.loads(result.output)["holds"] is True


def test_a_claim_that_does_not_hold_fails_the_command(monkeypatch):
    true = run_audit()
    first = true.rows[0]
    wrong = replace(true, rows=(replace(first, on_policy=true.rows[10].on_policy), *true.rows[1:]))
    monkeypatch.setattr("megatron_klrl.cli.audit.run_audit", lambda: wrong)

    with pytest.raises(WorkError, match=r"do not hold for: reward/k1/sequence/none$"):
        audit(json=True)


def test_a_picture_is_drawn_beside_the_numbers(tmp_path):
    result = CliRunner().invoke(_APP, ["--json", "--plot", str(tmp_path / "audit.png")])

    assert result.exit_code == 0
    assert json.loads(result.output)["holds"] is True
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "problem"), [("audit.jpx", "no picture file"), ("missing/audit.png", "no folder")])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, name, problem):
    monkeypatch.setattr("megatron_klrl.cli.audit.run_audit", lambda: pytest.fail("the work was done"))

    with pytest.raises(UserError, match=f"--plot.*{problem}"):
        audit(plot=tmp_path / name)
