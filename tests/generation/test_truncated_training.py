"""A training run that samples from a truncated distribution: what it is told, what it logs."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_train import RECIPE, klrl

pytestmark = pytest.mark.e2e


def test_rollouts_are_cut_and_the_log_says_so(tmp_path: Path) -> None:
    """With the most probable token alone, the engine is certain (log-probability 0) and the trainer is not."""
    cut = ["generation.top_k=1", "kl.allow_biased=true"]
    short = ["loop.steps=1", "data.eval={}", "optimum.prompts=0", "parallel.tensor=1"]
    done = klrl("train", RECIPE, *short, *cut, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "come from a truncated distribution" in (tmp_path / "run" / "card.md").read_text()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["mismatch/prob_ratio_mean"] < 0.98, "trainer's probability of what was certain"
    assert row["mismatch/verified_abs_max"] < 1e-4, "the verification draws from the whole distribution"
    sample = json.loads((tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert set(sample["rollout_logprobs"]) == {0.0}
    refused = klrl("train", RECIPE, *short, cut[0], "--dry-run")
    assert refused.returncode == 2
    assert "generation.top_k: rollouts with top_k 1" in refused.stderr
