"""Who is in parity and who is not: nothing that is wrong, NaN or missing may pass."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.harness.parity import Answer, differences
from benchmarks.harness.session import not_in_parity
from benchmarks.harness.spec import Contestant, Tolerance

TOLERANCE = Tolerance(loss=1e-3, values=1e-3, gradient=1e-2)
ANYONE = Contestant(name="anyone", factory="nobody:nothing")


def answer(loss: float, gradient: list[float]) -> Answer:
    return Answer(loss=torch.tensor(loss), gradients={"logits": torch.tensor(gradient)})


def test_differences_are_relative_norms_and_the_loss_per_unit() -> None:
    found = differences(answer(4.2, [3.0, 5.0]), answer(4.0, [3.0, 4.0]))
    assert found == {"loss": pytest.approx(0.05, rel=1e-5), "gradients/logits": pytest.approx(0.2)}


def test_a_small_loss_is_compared_absolutely() -> None:
    assert differences(answer(0.002, [1.0]), answer(0.001, [1.0]))["loss"] == pytest.approx(0.001, rel=1e-4)


def test_a_gradient_of_zero_has_no_relative_difference() -> None:
    assert differences(answer(0.0, [0.0, 0.5]), answer(0.0, [0.0, 0.0]))["gradients/logits"] == 0.5


def test_a_large_gradient_is_compared_to_its_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.parity._BLOCK", 2)
    true, given = torch.ones(5), torch.ones(5)
    given[4] = 1 + math.sqrt(5)
    found = differences(Answer(gradients={"w": given}), Answer(gradients={"w": true}))
    assert found["gradients/w"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        Answer(gradients={"logits": torch.ones(2)}),
        Answer(loss=torch.tensor(1.0)),
        Answer(loss=torch.tensor(1.0), gradients={"logits": torch.ones(3)}),
        Answer(loss=torch.tensor(1.0), gradients={"logits": torch.ones(2)}, values={"variance": torch.ones(2)}),
    ],
)
def test_an_answer_to_something_else_is_refused(wrong: Answer) -> None:
    with pytest.raises(ValueError, match="truth"):
        differences(wrong, answer(1.0, [1.0, 1.0]))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"loss": 2e-3, "gradients/logits": 0.0}, "loss"),
        ({"loss": 0.0, "gradients/logits": 2e-2}, "gradients/logits"),
        ({"loss": 0.0, "values/entropy": 2e-3}, "values/entropy"),
        ({"loss": math.nan, "gradients/logits": 0.0}, "loss"),
    ],
)
def test_who_is_too_far_away_is_not_in_parity(found: dict[str, float], named: str) -> None:
    assert f"{named} differs by" in not_in_parity(found, TOLERANCE, ANYONE)


def test_who_is_near_is_in_parity() -> None:
    assert not_in_parity({"loss": 1e-3, "values/entropy": 1e-3, "gradients/logits": 1e-2}, TOLERANCE, ANYONE) == ""


def test_a_contestants_own_bound_is_for_its_gradient_alone() -> None:
    coarse = Contestant(name="coarse", factory="nobody:nothing", gradient_tolerance=0.1)
    assert not_in_parity({"loss": 0.0, "gradients/logits": 0.05}, TOLERANCE, coarse) == ""
    assert not_in_parity({"loss": 0.05, "gradients/logits": 0.05}, TOLERANCE, coarse) != ""


def test_an_answer_survives_a_file(tmp_path: Path) -> None:
    whole = Answer(loss=torch.tensor(1.5), values={"e": torch.ones(2)}, gradients={"w": torch.ones(3)})
    whole.save(str(tmp_path / "truth"))
    assert set(differences(Answer.load(str(tmp_path / "truth")), whole).values()) == {0.0}
