"""Rules for beta against numbers worked out by hand."""

import pytest

from megatron_klrl.kl.beta import Cosine, Fixed, Linear, Target

TARGET = Target(start=0.1, target=2.0, gain=0.1, clip=0.2, low=0.05, high=0.2)


def test_schedules_by_hand() -> None:
    assert [Fixed(value=0.3).beta(step, None) for step in (1, 50)] == [0.3, 0.3]
    linear = Linear(start=0.4, final=0.0, steps=5)
    assert [linear.beta(step, None) for step in (1, 2, 3, 5, 9)] == pytest.approx([0.4, 0.3, 0.2, 0.0, 0.0])
    cosine = Cosine(start=1.0, final=0.0, steps=3)
    assert [cosine.beta(step, None) for step in (1, 2, 3, 4)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert Linear(start=0.4, final=0.1, steps=1).beta(1, None) == 0.4
    assert Linear(start=0.4, final=0.1, steps=1).learn(0.4, 9.0) is None


@pytest.mark.parametrize(
    ("kl", "factor"), [(2.0, 1.0), (2.2, 1.01), (9.0, 1.02), (1.8, 0.99), (0.0, 0.98)], ids=lambda value: f"{value:g}"
)
def test_the_target_follows_the_clipped_relative_error(kl: float, factor: float) -> None:
    assert TARGET.learn(0.1, kl) == pytest.approx(0.1 * factor, rel=1e-12)


def test_the_target_stays_in_its_range_and_goes_on_from_what_it_learnt() -> None:
    assert TARGET.learn(0.199, 9.0) == 0.2
    assert TARGET.learn(0.0501, 0.0) == 0.05
    assert TARGET.beta(1, None) == 0.1
    assert TARGET.beta(7, 0.17) == 0.17


def test_the_target_is_reached_where_more_beta_means_less_kl() -> None:
    """With KL = .3 / beta the budget of 2 nats belongs to beta .15; from .1 it takes a while, and stays."""
    beta, learnt = 0.0, None
    for step in range(1, 201):
        beta = TARGET.beta(step, learnt)
        learnt = TARGET.learn(beta, 0.3 / beta)
    assert beta == pytest.approx(0.15, rel=1e-6)
