import json

import pytest
import torch

from megatron_klrl.kl import KLConfig, Objective, Verdict, catalogue, run_audit
from megatron_klrl.kl.audit import TOLERANCE, AuditReport, AuditRow, audit_configuration
from megatron_klrl.kl.effects import BETA
from megatron_klrl.kl.exact import Sharing, build_space, token_kl_gradient
from megatron_klrl.kl.measure import relative_error, row_gradients, variance
from tests.unit.kl.problems import random_problem

_UNBIASED_FOR_THE_SEQUENCE = [
    "reward/k1/sequence/none",
    "reward/k1/to_go/none",
    "loss/k2/sequence/none",
    "both/k1/to_go/none",
    "both/k3/sequence/none",
    "both/k3/to_go/none",
    "loss/k1/to_go/prefix",
    "loss/k3/to_go/prefix",
    "both/exact/sequence/none",
    "both/exact/to_go/none",
]
_UNBIASED_OFF_POLICY = [
    "reward/k1/sequence/sequence",
    "reward/k1/to_go/prefix",
    "both/k3/sequence/sequence",
    "loss/k3/to_go/prefix",
    "loss/k1/to_go/prefix",
    "both/exact/to_go/prefix",
    "loss/exact/to_go/prefix",
]


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return run_audit()


def _row(report: AuditReport, name: str) -> AuditRow:
    (row,) = [row for row in report.rows if row.entry.name == name]
    return row


def test_every_claim_of_the_catalogue_holds(report):
    assert [row.entry for row in report.rows] == list(catalogue())
    assert report.failures() == ()


@pytest.mark.parametrize(
    "sizes", [{"seed": 1}, {"seed": 2, "num_prompts": 1, "max_tokens": 3}, {"vocab_size": 4, "max_tokens": 3}]
)
def test_claims_hold_on_other_policies(sizes):
    assert run_audit(**sizes).failures() == ()


@pytest.mark.parametrize("name", _UNBIASED_FOR_THE_SEQUENCE)
def test_sequence_gradient_on_policy(report, name):
    assert _row(report, name).on_policy.sequence.relative_error < 1e-12


@pytest.mark.parametrize("name", _UNBIASED_OFF_POLICY)
def test_sequence_gradient_off_policy(report, name):
    assert _row(report, name).off_policy.sequence.relative_error < 1e-12


def test_biased_rows_are_far_from_both_objectives(report):
    biased = [row for row in report.rows if {row.entry.verdict(o) for o in Objective} == {Verdict.BIASED}]

    assert len(biased) > 40
    for row in biased:
        assert row.on_policy.sequence.relative_error > 0.02, row.entry.name
        assert row.on_policy.token_policy_prefixes.relative_error > 0.02, row.entry.name


def test_zero_rows_have_variance_but_no_gradient(report):
    row = _row(report, "loss/k1/token/none")

    assert row.on_policy.norm < TOLERANCE
    assert row.on_policy.sequence.cosine is None
    assert row.on_policy.variance > 1.0
    assert row.off_policy.norm > 0.1  # off-policy it pushes away from the samples


def test_token_rows_say_whose_prefixes(report):
    assert _row(report, "loss/k3/token/token").off_policy.token_prefixes() == "rollout"
    assert _row(report, "reward/k1/token/prefix").off_policy.token_prefixes() == "policy"
    assert _row(report, "loss/exact/token/none").off_policy.token_prefixes() == "rollout"
    assert _row(report, "reward/k1/to_go/none").off_policy.token_prefixes() is None


def test_lower_variance_where_it_is_said(report):
    variances = {row.entry.name: row.on_policy.variance for row in report.rows}

    assert variances["reward/k1/to_go/none"] < variances["reward/k1/sequence/none"]
    assert variances["both/exact/to_go/none"] < variances["both/exact/sequence/none"]
    assert variances["both/exact/to_go/none"] == min(variances[name] for name in _UNBIASED_FOR_THE_SEQUENCE)


def test_variance_is_that_of_samples():
    space = build_space(num_prompts=1, vocab_size=3, max_tokens=3, sharing=Sharing.SHARED)
    problem = random_problem(space, on_policy=True)
    gradients = row_gradients(problem, catalogue()[1].config)
    rows = torch.multinomial(problem.probs(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))

    sampled = float(gradients[rows].var(0).sum())

    assert variance(problem, gradients) == pytest.approx(sampled, rel=0.03)  # 200k samples


def test_a_wrong_claim_is_caught(report):
    sequence, token = _row(report, "reward/k1/to_go/none"), _row(report, "loss/k2/token/none")
    swapped = AuditRow(entry=token.entry, on_policy=sequence.on_policy, off_policy=sequence.off_policy)

    assert swapped.holds() is False
    assert AuditReport(problem={}, rows=(swapped,), effects=()).failures() == ("loss/k2/token/none",)


def test_token_gradients_need_their_own_prefixes():
    space = build_space(num_prompts=1, vocab_size=3, max_tokens=3, sharing=Sharing.SHARED)
    problem = random_problem(space, on_policy=False)
    own, theirs = (
        token_kl_gradient(space, problem.policy, problem.reference, prefixes=prefixes)
        for prefixes in (problem.policy, problem.rollout)
    )

    assert relative_error(own, theirs) > 0.01


def test_json_is_plain_and_complete(report):
    data = json.loads(report.to_json())

    assert data["holds"] is True
    assert len(data["rows"]) == 119
    row = data["rows"][0]
    assert row["config"] == {"estimator": "k1", "placement": "reward", "credit": "sequence", "correction": "none"}
    assert row["verdict"] == {"sequence": "unbiased_on_policy", "token": "biased"} == row["measured_verdict"]
    assert row["on_policy"]["sequence"]["relative_error"] < TOLERANCE
    assert row["off_policy"]["token_rollout_prefixes"]["cosine"] < 1
    assert {effect["practice"] for effect in data["effects"]} == {effect.practice for effect in report.effects}


def test_too_small_a_problem_is_refused():
    with pytest.raises(ValueError, match="max_tokens 1 is too small"):
        run_audit(max_tokens=1)


# ------------------------------------------------------------------------------------------------- second table


def _effects(report: AuditReport, text: str) -> list:
    found = [effect for effect in report.effects if text in effect.practice]
    assert found, text
    return found


@pytest.mark.parametrize("practice", ["(RLOO)", "without baseline"])
def test_leave_one_out_is_exact(report, practice):
    for effect in _effects(report, practice):
        assert effect.scale == pytest.approx(1.0, abs=1e-12)
        assert effect.off_direction < 1e-12
        assert effect.effective_beta == pytest.approx(BETA, abs=1e-12)


def test_a_mean_with_self_shrinks_and_keeps_the_direction(report):
    for effect in _effects(report, "(Dr. GRPO)"):
        assert effect.scale == pytest.approx(1 - 1 / effect.group_size, abs=1e-12)
        assert effect.off_direction < 1e-12


@pytest.mark.parametrize("practice", ["(GRPO)", "after", "beta K3"])
def test_standard_deviations_and_k3_in_the_reward_change_beta(report, practice):
    for effect in _effects(report, practice):
        assert effect.off_direction > 0.03
        assert abs(effect.effective_beta - BETA) > 0.02


def test_only_a_plain_sum_over_tokens_keeps_the_gradient(report):
    for effect in _effects(report, "sum over tokens, mean over sequences"):
        assert effect.scale == pytest.approx(1.0, abs=1e-12)
        assert effect.off_direction < 1e-12
    for effect in _effects(report, "mean over the tokens") + _effects(report, "token mean in the loss"):
        assert effect.off_direction > 0.03


def test_a_linear_tail_is_nearer_than_a_clamp(report):
    for estimator in ("k1", "k3"):
        hard, tail = _effects(report, f"both/{estimator}/to_go/none: log-ratio")
        assert hard.fraction == tail.fraction > 0.1
        assert abs(tail.scale - 1) < abs(hard.scale - 1)
        assert tail.off_direction < hard.off_direction


def test_clipping_gates_the_kl_in_the_advantage(report):
    (effect,) = _effects(report, "ratio clipped")

    assert effect.fraction > 0.1
    assert effect.scale < 0.9


def test_a_runs_own_row_is_the_row_of_the_whole_audit(report: AuditReport) -> None:
    config = KLConfig(beta=0.3, estimator="k3", placement="loss", credit="token")
    row = audit_configuration(config)
    assert row.to_dict() == next(r for r in report.rows if r.entry.name == row.entry.name).to_dict()
    assert row.entry.config.axes == config.axes
