import subprocess
import sys
from itertools import product

import pytest
from pydantic import ValidationError

from megatron_klrl.kl import Correction, Credit, Estimator, KLConfig, Objective, Placement, catalogue


def test_defaults_are_k1_in_the_reward():
    config = KLConfig()

    assert (config.beta, config.objective, config.allow_biased) == (0.05, Objective.SEQUENCE, False)
    assert config.name == "reward/k1/to_go/none"


@pytest.mark.parametrize(
    ("field", "value"), [("beta", -0.1), ("beta", float("nan")), ("estimator", "k4"), ("kl_coef", 0.1)]
)
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        KLConfig(**{field: value})


def test_it_cannot_be_changed():
    config = KLConfig()

    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, "beta", 1.0)  # noqa: B010  (a plain assignment is what the type checker refuses)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("loss/k3/to_go/none", "placement=loss, estimator=k3, credit=token, correction=none"),
        ("loss/k1/sequence/none", "placement=loss, estimator=k1, credit=token, correction=none"),
        ("loss/k3/token/prefix", "placement=loss, estimator=k3, credit=to_go, correction=prefix"),
        ("loss/k2/sequence/token", "placement=loss, estimator=k2, credit=token, correction=token"),
        ("reward/k1/sequence/prefix", "placement=reward, estimator=k1, credit=to_go, correction=prefix"),
        ("reward/exact/token/none", "placement=reward, estimator=exact, credit=to_go, correction=none"),
        ("both/exact/to_go/token", "placement=both, estimator=exact, credit=to_go, correction=prefix"),
        ("loss/exact/token/token", "placement=loss, estimator=exact, credit=token, correction=none"),
    ],
)
def test_a_combination_without_meaning_names_the_nearest_with_meaning(given, nearest):
    placement, estimator, credit, correction = given.split("/")

    with pytest.raises(ValueError, match=f"{given} .*means nothing.*{nearest}"):
        KLConfig(placement=placement, estimator=estimator, credit=credit, correction=correction)


def test_every_combination_is_either_in_the_catalogue_or_refused():
    listed = {entry.name for entry in catalogue()}
    accepted = set()
    for placement, estimator, credit, correction in product(Placement, Estimator, Credit, Correction):
        try:
            config = KLConfig(placement=placement, estimator=estimator, credit=credit, correction=correction)
        except ValueError:
            continue
        accepted.add(config.name)

    assert accepted == listed
    assert len(accepted) == 119  # of 180; counted by hand: 49 reward, 49 both, 21 loss


def test_configuration_catalogue_and_refusal_need_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_klrl.kl import KLConfig, catalogue, refusal, render_catalogue\n"
        "import megatron_klrl.kl\n"
        "assert refusal(KLConfig(), on_policy=False) and len(catalogue()) and render_catalogue()\n"
        "assert set(megatron_klrl.kl.__all__) >= {'kl_surrogate', 'KLConfig', 'catalogue'}\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_all_names_of_the_package_exist():
    import megatron_klrl.kl as package  # noqa: PLC0415  (the import is what is tested)

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="k4"):
        package.k4  # noqa: B018
