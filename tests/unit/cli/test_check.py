from pathlib import Path

import pytest

from tests.unit.cli.programs import RECIPE, klrl_here


def test_help_shows_an_example(tmp_path: Path) -> None:
    done = klrl_here("check", "gradient", "--help", cwd=tmp_path)
    assert done.exit_code == 0
    assert "Example: klrl check gradient" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kl.beta=0"], "kl.beta: is 0: there is no KL term to check. Fix: set kl.beta above 0"),
        (["kl.placement=loss", "kl.credit=token"], "kl.allow_biased=true"),
        (["kl.betta=1"], "kl.beta"),
        (["--batches", "1"], "--batches"),
    ],
    ids=["no KL", "biased", "misspelt", "no error bar"],
)
def test_what_cannot_be_probed_is_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = klrl_here("check", "gradient", RECIPE, *arguments, cwd=tmp_path)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""
