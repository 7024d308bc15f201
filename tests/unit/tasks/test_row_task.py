"""A table as a stream: order, templates, verification of the last box."""

from functools import partial

import pytest

from megatron_klrl.tasks.grading import ExactGrader
from megatron_klrl.tasks.rendering import Framing
from megatron_klrl.tasks.row_task import RowTask
from megatron_klrl.tasks.rows import Row
from megatron_klrl.tasks.task import Response, Verdicts

ROWS = [Row(f"calc{digit}+0", str(digit)) for digit in range(10)]
plain = partial(RowTask, ROWS, grader=ExactGrader(), framing=Framing(), seed=0, shuffle=False)
shuffled = partial(RowTask, ROWS, grader=ExactGrader(), framing=Framing(), shuffle=True)


def _answers(task: RowTask, start: int, count: int) -> str:
    return "".join(prompt.answer for prompt in task.prompts(start, count))


def test_unshuffled_order_is_the_table_again_and_again(tokenizer) -> None:
    task = plain(tokenizer=tokenizer)
    assert len(task) == 10
    assert _answers(task, 0, 25) == "0123456789012345678901234"
    assert [prompt.index for prompt in task.prompts(8, 4)] == [8, 9, 10, 11]


def test_each_shuffled_epoch_is_a_permutation_of_its_own(tokenizer) -> None:
    task = shuffled(tokenizer=tokenizer, seed=0)
    epochs = [_answers(task, 10 * epoch, 10) for epoch in range(4)]
    assert all(sorted(epoch) == list("0123456789") for epoch in epochs)
    assert len(set(epochs)) == 4


def test_the_stream_depends_on_seed_and_index_only(tokenizer) -> None:
    task = shuffled(tokenizer=tokenizer, seed=0)
    one_by_one = [task.prompts(index, 1)[0] for index in reversed(range(30))][::-1]
    assert shuffled(tokenizer=tokenizer, seed=0).prompts(0, 30) == one_by_one
    assert _answers(shuffled(tokenizer=tokenizer, seed=1), 0, 30) != _answers(task, 0, 30)


def test_prompts_go_through_the_chat_template(tokenizer) -> None:
    prompt = plain(tokenizer=tokenizer).prompts(7, 1)[0]
    assert prompt.text == "<|im_start|>calc7+0<|im_end|>"
    assert tokenizer.decode(list(prompt.token_ids)) == prompt.text


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7+0=7\\boxed{7}<eos>", 1.0),
        ("\\boxed{3}\\boxed{7}<eos>", 1.0),
        ("\\boxed{7}\\boxed{3}<eos>", 0.0),
        ("\\boxed{7}+0=7", 1.0),
        ("\\boxed{7", 0.0),
        ("\\boxed{7<eos>", 0.0),
        ("7<eos>", 0.0),
        ("\\boxed{77}<eos>", 0.0),
        ("\\boxed{}<eos>", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_balanced_box_decides(tokenizer, response: str, reward: float) -> None:
    task = plain(tokenizer=tokenizer)
    prompt = task.prompts(7, 1)[0]
    assert task.verify([Response(prompt, tokenizer.encode(response))]) == Verdicts(rewards=[reward])


def test_a_grader_sees_the_question_of_each_prompt(tokenizer) -> None:
    seen = []

    class Recorder:
        def grade(self, attempts) -> Verdicts:
            seen.extend((each.question, each.response, each.answer) for each in attempts)
            return Verdicts(rewards=[0.5] * len(attempts))

    task = RowTask(ROWS, grader=Recorder(), framing=Framing(), seed=3, shuffle=True, tokenizer=tokenizer)
    prompts = task.prompts(8, 4)  # across the border of two epochs
    found = task.verify([Response(prompt, tokenizer.encode("1<eos>")) for prompt in prompts])
    assert found.rewards == [0.5] * 4
    assert seen == [(f"calc{prompt.answer}+0", "1", prompt.answer) for prompt in prompts]
