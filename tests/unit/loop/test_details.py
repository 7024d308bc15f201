import torch

from megatron_klrl.loop.details import by_position, due
from megatron_klrl.loop.frontier import draw


def test_the_profile_is_a_mean_over_the_responses_that_are_that_long() -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, False], [False, False, True, False]])
    values = torch.tensor([[9.0, 1.0, 3.0, 9.0], [5.0, 7.0, 9.0, 9.0], [9.0, 9.0, 6.0, 9.0]])
    assert by_position(values, mask) == [4.0, 5.0, 9.0]


def test_about_twenty_steps_are_shown_in_detail() -> None:
    assert [step for step in range(1, 101) if due(step, steps=100)] == [1, *range(5, 101, 5)]
    assert all(due(step, steps=7) for step in range(1, 8))


def test_the_frontier_marks_the_optimum_where_there_is_one() -> None:
    trail = [(0.1, 0.4), (0.5, 0.7)]
    labels = [
        [text.get_text() for text in draw(trail, reference_rates=rates, beta=beta).axes[0].get_legend().get_texts()]
        for rates, beta in (((), 0.1), ((0.5,), 0.0), ((0.5,), 0.1))
    ]
    steps = "steps, first dark to last light"
    optimum = "optimum, closed form"
    assert [sorted(each) for each in labels] == [
        [steps],
        sorted([optimum, steps]),
        sorted(["at beta 0.1", optimum, steps]),
    ]
