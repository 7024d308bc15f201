import pytest

from megatron_klrl.kl import KLConfig, Objective, catalogue, refusal


def _config(name: str, objective: Objective = Objective.SEQUENCE) -> KLConfig:
    placement, estimator, credit, correction = name.split("/")
    return KLConfig(
        placement=placement, estimator=estimator, credit=credit, correction=correction, objective=objective, beta=0.3
    )


def test_the_default_is_accepted_on_policy_and_refused_off_policy():
    assert refusal(KLConfig(), on_policy=True) is None

    refused = refusal(KLConfig(), on_policy=False)

    assert refused is not None
    assert "reward/k1/to_go/none" in refused.reason
    assert "off-policy" in refused.reason
    assert refused.nearest == KLConfig(correction="prefix")


@pytest.mark.parametrize(
    ("name", "on_policy", "objective", "nearest"),
    [
        ("loss/k1/token/none", True, "sequence", "reward/k1/to_go/none"),
        ("loss/k3/token/none", True, "sequence", "both/k3/to_go/none"),
        ("reward/k3/to_go/none", True, "sequence", "both/k3/to_go/none"),
        ("loss/k2/token/none", True, "sequence", "loss/k2/sequence/none"),
        ("loss/exact/token/none", True, "sequence", "both/exact/to_go/none"),
        ("reward/k1/token/none", True, "sequence", "reward/k1/to_go/none"),
        ("loss/k3/token/none", True, "token", "loss/k3/token/token"),
        ("reward/k1/to_go/none", True, "token", "reward/k1/token/none"),
        ("reward/k1/sequence/none", False, "sequence", "reward/k1/sequence/sequence"),
        ("loss/k3/token/token", False, "sequence", "loss/k3/to_go/prefix"),
        ("both/exact/to_go/none", False, "sequence", "both/exact/to_go/prefix"),
        ("loss/k2/token/none", False, "token", "loss/k2/token/token"),
    ],
)
def test_nearest_changes_little_and_follows_the_objective(name, on_policy, objective, nearest):
    refused = refusal(_config(name, Objective(objective)), on_policy=on_policy)

    assert refused is not None
    assert refused.nearest.name == nearest
    assert refused.nearest.beta == 0.3
    assert refused.nearest.objective == objective


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("objective", Objective)
def test_what_is_offered_is_accepted_for_every_configuration(on_policy, objective):
    for entry in catalogue():
        refused = refusal(_config(entry.name, objective), on_policy=on_policy)
        accepted = entry.expected_gradient(on_policy=on_policy).follows(objective)

        assert (refused is None) == accepted
        if refused is not None:
            assert refusal(refused.nearest, on_policy=on_policy) is None
            assert refused.reason.count("\n") == 0


def test_a_configuration_exact_for_the_other_objective_says_so():
    refused = refusal(_config("loss/k3/token/token"), on_policy=True)

    assert refused is not None
    assert "exact for objective=token" in refused.reason


def test_zero_beta_applies_nothing_and_is_never_refused():
    config = KLConfig(beta=0.0, placement="loss", credit="token")

    assert refusal(config, on_policy=False) is None
