import pytest
import torch

from megatron_klrl.diagnostics.gradient_probe import descent_check, paired_decrease
from megatron_klrl.diagnostics.report import Verdict


def test_decrease_has_prompts_as_independent_units() -> None:
    """Two prompts with decreases 1 and 3 on average: mean 2, standard error sqrt(2) / sqrt(2)."""
    before = torch.tensor([1.0, 3.0, 5.0, 5.0])
    after = torch.tensor([1.0, 1.0, 1.0, 3.0])
    assert paired_decrease(before, after, group_size=2) == (2.0, pytest.approx(1.0))


def test_completions_of_one_prompt_do_not_make_the_error_smaller() -> None:
    before, after = torch.tensor([1.0, 4.0, 2.0, 0.0]), torch.zeros(4)
    once = paired_decrease(before, after, group_size=1)
    thrice = paired_decrease(before.repeat_interleave(3), after.repeat_interleave(3), group_size=3)
    assert thrice == pytest.approx(once)


def test_the_error_of_a_gradient_is_what_its_batches_disagree_about() -> None:
    """Equal decrease, equal sampling error: a gradient that points anywhere does not pass, a steady one does."""
    before, after = torch.full((8,), 1.0), torch.tensor([0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9])
    steady = descent_check(before, after, tangent=torch.tensor([0.14, 0.16, 0.15, 0.15]), group_size=2)
    noise = descent_check(before, after, tangent=torch.tensor([1.0, -0.9, 1.1, -0.6]), group_size=2)
    assert steady.numbers["decrease"] == noise.numbers["decrease"] == pytest.approx(0.15)
    assert steady.numbers["standard_error_of_sampling"] == noise.numbers["standard_error_of_sampling"]
    assert (steady.verdict, noise.verdict) == (Verdict.HOLDS, Verdict.FAILS)


def test_an_increase_fails() -> None:
    found = descent_check(torch.ones(8), torch.full((8,), 1.5), tangent=torch.full((4,), 0.1), group_size=2)
    assert found.verdict is Verdict.FAILS
