"""Stale rollouts, several updates of a batch, a reference that is reset, a steered beta: one run, and its resume."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.test_train import RECIPE, Trained, klrl, reproducible

STEPS, HALF, STALENESS = 6, 3, 2
SETTINGS = [
    f"loop.steps={STEPS}",
    f"loop.checkpoint_every={HALF}",
    f"loop.max_staleness={STALENESS}",
    "loop.updates_per_batch=2",
    "loop.eval_every=0",
    "loop.split_gradient_every=0",
    "data.eval={}",
    "optimum.prompts=0",
    "optimizer.lr=1e-3",
    "kl.correction=prefix",
    "kl_control.kind=target",
    "kl_control.target=0.01",
    "reference.reset_every=2",
    "mismatch.correction=prefix_truncate",
    "algorithm.dynamic_sampling_rounds=1",
    "checkpoint.asynchronous=true",
]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Six steps with everything that moves while a run goes on."""
    folder = tmp_path_factory.mktemp("runs") / "stale"
    done = klrl("train", RECIPE, *SETTINGS, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()[-3000:]
    return Trained(folder, done.stdout)


def test_rollouts_are_as_old_as_allowed(trained: Trained) -> None:
    rows = trained.metrics()
    assert [row["staleness/max"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert [row["staleness/mean"] for row in rows] == [0, 1, 2, 2, 2, 2]
    gaps = [row["mismatch/logprob_abs_mean"] for row in rows]
    assert gaps[0] < 1e-5, "the first rollouts are the policy's own"
    assert min(gaps[1:]) > 1e-4, "the others are those of an older one"
    assert rows[0]["kl/ratio_ess"] == pytest.approx(1, abs=1e-6)
    assert all(0 < row["kl/ratio_ess"] < 1 for row in rows[1:])


def test_the_reference_is_reset_and_the_card_says_so(trained: Trained) -> None:
    rows = trained.metrics()
    assert [row["kl/reference_step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    distances = [row["kl/exact"] for row in rows]
    assert [distance < 1e-6 for distance in distances] == [True, False, True, False, True, False]
    card = (trained.folder / "card.md").read_text()
    assert "reset to the policy every 2 steps" in card
    assert f"as of step {STEPS}" in card
    state = json.loads((trained.folder / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text())
    assert state["reference_step"] == STEPS
    assert state["reference_checksum"] in card
    assert state["updates"] == 2 * STEPS


def test_beta_follows_the_kl(trained: Trained) -> None:
    """Up by 2 % after a step whose KL is far above the budget, down by 2 % after one without KL."""
    rows = trained.metrics()
    for before, after in pairwise(rows):
        error = max(-0.2, min(0.2, before["kl/exact"] / 0.01 - 1))
        assert after["kl/beta"] == pytest.approx(before["kl/beta"] * (1 + 0.1 * error), rel=1e-9)
    assert len({row["kl/beta"] for row in rows}) > 2


def test_a_resumed_run_repeats_the_uninterrupted_one(trained: Trained, tmp_path: Path) -> None:
    """Bit for bit, with rollouts that were waiting, a reference that had moved, and what beta had learnt."""
    again = tmp_path / "again"
    shutil.copytree(trained.folder, again, ignore=shutil.ignore_patterns(f"step_{STEPS:06d}"))
    done = klrl("train", RECIPE, *SETTINGS, "--run-dir", again, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {HALF}" in done.stdout
    assert reproducible(Trained(again, "").metrics()) == reproducible(trained.metrics())
