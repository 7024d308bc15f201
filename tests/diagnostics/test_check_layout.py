"""``klrl check layout`` on the shipped recipe: real rollouts, every kind of layout, and a difference that is found."""

import json

import pytest

from tests.e2e.test_train import RECIPE, klrl

pytestmark = pytest.mark.e2e


@pytest.mark.long
def test_every_default_layout_holds() -> None:
    """One of each kind, with the loss side of a KL that takes the full vocabulary: the hardest gradient to cut."""
    done = klrl("check", "layout", RECIPE, "kl.estimator=exact", "kl.placement=both", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    names = [check["check"].split()[0] for check in report["checks"]]
    assert {"packed", "recompute", "tp2", "tp2sp", "pp2", "pp2vp2", "cp2", "cp2-packed", "dp2", "tp2pp2"} <= set(names)
    for check in report["checks"]:
        assert max(check["numbers"].values()) < report["bound"]


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ("tp2,tq2", "'tq2' is not a layout"),
        ("tp3", "3 does not divide the model's"),
        ("ep2", "the model has no experts"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_any_work(layouts: str, said: str) -> None:
    done = klrl("check", "layout", RECIPE, "--layouts", layouts)
    assert done.returncode == 2
    assert said in done.stderr
