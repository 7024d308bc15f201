"""Step metrics by hand."""

import math

import torch

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.metrics.names import known
from megatron_klrl.metrics.step import of_mismatch, of_rollouts, of_scores
from megatron_klrl.rl.mismatch import sequence_mask, token_truncate

MASK = torch.tensor([[True, True], [True, False]])


def batch() -> RolloutBatch:
    return RolloutBatch(
        tokens=torch.zeros(2, 3, dtype=torch.long),
        response_mask=MASK,
        rollout_logprobs=torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]),
        rewards=torch.tensor([1.0, 0.0]),
        truncated=torch.tensor([False, True]),
        weight_version=torch.tensor([4, 7]),
    )


def test_rollout_metrics_by_hand() -> None:
    found = of_rollouts(batch(), weight_version=8)
    assert found == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "response/length_mean": 1.5,
        "response/truncated_fraction": 0.5,
        "staleness/mean": 2.5,
        "staleness/max": 4.0,
    }


def test_score_metrics_by_hand() -> None:
    scores = TokenScores(
        old_logprobs=torch.tensor([[-1.0, -1.5], [-0.5, 0.0]]),
        entropy=torch.tensor([[0.3, 0.6], [0.9, 99.0]]),
        ref_logprobs=torch.tensor([[-2.0, -1.0], [-0.5, 0.0]]),
        full_kl=torch.tensor([[0.2, 0.4], [0.0, 99.0]]),
    )
    found = of_scores(batch(), scores)
    k3 = [math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5, 0.0]
    expected = {
        "policy/entropy": 0.6,
        "mismatch/logprob_abs_mean": 1 / 3,
        "mismatch/kl": (math.exp(-0.5) - 1 + 0.5 + math.exp(0.5) - 1 - 0.5) / 3,
        "mismatch/prob_ratio_mean": (1 + math.exp(-0.5) + math.exp(0.5)) / 3,
        "kl/k1": (1.0 - 0.5) / 2,
        "kl/k3": sum(k3) / 2,
        "kl/exact": 0.3,
        "kl/max": 0.4,
        "kl/p95": 0.38,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-5), name


def test_the_fraction_beyond_the_clamp_is_reported_where_one_is_set() -> None:
    scores = TokenScores(
        old_logprobs=torch.tensor([[-1.0, -1.5], [-0.5, 0.0]]),
        entropy=torch.zeros(2, 2),
        ref_logprobs=torch.tensor([[-2.0, -1.0], [-0.5, 9.0]]),
        full_kl=torch.zeros(2, 2),
    )
    assert of_scores(batch(), scores, log_ratio_clamp=0.7)["kl/clamp_fraction"] == torch.tensor(1 / 3).item()
    assert "kl/clamp_fraction" not in of_scores(batch(), scores)


def test_without_a_reference_there_is_no_distance() -> None:
    scores = TokenScores(old_logprobs=torch.zeros(2, 2), entropy=torch.zeros(2, 2))
    assert not any(name.startswith("kl/") for name in of_scores(batch(), scores))


def test_mismatch_metrics_say_what_the_correction_did() -> None:
    """Weights e, 1 and 1 of tokens, e and 1 of sequences; a truncation and a masking each have their own name."""
    rollout = batch().rollout_logprobs
    old = rollout + torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    truncated = of_mismatch(token_truncate(old, rollout, mask=MASK, high=2.0))
    masked = of_mismatch(sequence_mask(old, rollout, mask=MASK, low=0.5, high=2.0))
    for found, expected in (
        (truncated, {"mismatch/truncated_fraction": 1 / 3, "mismatch/ess": 4**2 / (3 * 6)}),
        (masked, {"mismatch/masked_fraction": 1 / 2, "mismatch/ess": 1 / 2}),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert math.isclose(found[name], value, rel_tol=1e-6), name
            assert known(name)
