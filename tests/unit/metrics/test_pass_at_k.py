"""pass@k and intervals, by hand and against the definition."""

import math
from itertools import combinations

import pytest

from megatron_klrl.metrics.pass_at_k import Estimate, over_prompts, pass_at_k, powers_of_two


@pytest.mark.parametrize(
    ("samples", "solved", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - C(3, 3) / C(5, 3) = 1 - 1/10
        (4, 1, 1, 0.25),
        (4, 1, 4, 1.0),
        (4, 0, 4, 0.0),
        (4, 4, 1, 1.0),
        (1, 0, 1, 0.0),
    ],
)
def test_by_hand(samples: int, solved: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, solved, k) == pytest.approx(expected, abs=1e-15)


def test_it_is_the_share_of_subsets_with_a_right_sample() -> None:
    right = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        subsets = list(combinations(right, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


def test_it_is_unbiased() -> None:
    """Over the binomial distribution of the number of right samples, exactly."""
    samples, p = 8, 0.3
    weights = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    for k in powers_of_two(samples):
        expectation = sum(weight * pass_at_k(samples, c, k) for c, weight in enumerate(weights))
        assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_many_samples_do_not_overflow() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("samples", "solved", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_what_is_not_defined_is_refused(samples: int, solved: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, solved, k)


def test_powers_of_two() -> None:
    assert [powers_of_two(samples) for samples in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_interval_by_hand() -> None:
    """Values 0, 1, 1, 1: deviation 0.5, standard error 0.25, so 0.75 +- 1.95996 / 4, cut at 1."""
    found = over_prompts([0.0, 1.0, 1.0, 1.0])
    assert found.value == 0.75
    assert found.interval_95 == (pytest.approx(0.75 - 1.959963984540054 / 4), 1.0)


def test_agreement_of_all_prompts_is_not_certainty() -> None:
    """(1 - p)^10 = 0.05 at the p that 10 failures leave just possible."""
    bound = over_prompts([0.0] * 10).interval_95
    assert bound is not None
    assert bound[0] == 0.0
    assert (1 - bound[1]) ** 10 == pytest.approx(0.05)
    assert over_prompts([1.0] * 10).interval_95 == (pytest.approx(1 - bound[1]), 1.0)


def test_rewards_beyond_0_and_1_are_not_cut() -> None:
    assert over_prompts([-3.0, 5.0]).interval_95 == (pytest.approx(1 - 1.959963984540054 * 4), pytest.approx(8.8398559))
    assert over_prompts([0.4]) == Estimate(value=0.4, interval_95=None)
