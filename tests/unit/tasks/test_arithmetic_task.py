"""Generators against hand-computed answers and by properties; the verifier at its edges."""

import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.arithmetic import ArithmeticKind, ArithmeticTask, Problem, apply_operator, draw_problem
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.types import Prompt


def _problem(kind: str, digits: str, operators: str = "") -> Problem:
    return Problem(kind=ArithmeticKind(kind), digits=tuple(map(int, digits)), operators=operators)


@pytest.mark.parametrize(
    ("problem", "question", "answer"),
    [
        (_problem("chain", "54118", "+-+-"), "calc5+4-1+1-8", "1"),
        (_problem("chain", "09", "+"), "calc0+9", "9"),
        (_problem("chain", "990", "-+"), "calc9-9+0", "0"),
        (_problem("op", "541", "^v"), "calc5^4v1", "1"),
        (_problem("op", "183", "^v"), "calc1^8v3", "3"),
        (_problem("rev", "3142"), "rev3142", "2413"),
        (_problem("rev", "007"), "rev007", "700"),
    ],
)
def test_question_and_answer_by_hand(problem: Problem, question: str, answer: str) -> None:
    assert (problem.question, problem.answer) == (question, answer)


def test_sums_leave_a_single_digit_even_after_a_slip() -> None:
    assert apply_operator("+", 9, 4) == 3
    assert apply_operator("-", 2, 5) == 7


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown operator"):
        apply_operator("*", 1, 1)


def test_chain_answers_agree_with_python_and_totals_stay_single_digits() -> None:
    rng = random.Random(5)
    for _ in range(500):
        question = draw_problem(rng, kind=ArithmeticKind.CHAIN, terms=4)
        expression = question.question.removeprefix("calc")
        assert len(re.findall(r"[+-]", expression)) == 4
        for end in range(1, len(expression) + 1, 2):
            assert 0 <= eval(expression[:end]) <= 9
        assert str(eval(expression)) == question.answer


def test_chain_answers_are_uniform() -> None:
    rng = random.Random(11)
    counts = Counter(draw_problem(rng, kind=ArithmeticKind.CHAIN, terms=3).answer for _ in range(4000))
    assert set(counts) == set("0123456789")
    # 400 expected each, standard deviation 19: five of them.
    assert all(305 < count < 495 for count in counts.values())


def test_op_answers_agree_with_python() -> None:
    rng = random.Random(6)
    for _ in range(200):
        problem = draw_problem(rng, kind=ArithmeticKind.EXTREMUM, terms=3)
        first, *rest = re.findall(r"[\^v]?\d", problem.question.removeprefix("calc"))
        total = int(first)
        for step in rest:
            total = max(total, int(step[1])) if step[0] == "^" else min(total, int(step[1]))
        assert len(rest) == 3
        assert problem.answer == str(total)


@pytest.mark.parametrize(("kind", "shortest"), [("chain", 3), ("op", 3), ("rev", 2)])
def test_every_length_in_the_range_and_no_other_occurs(tokenizer, kind: str, shortest: int) -> None:
    task = ArithmeticTask(kind=kind, terms=(shortest, shortest + 2), seed=0, tokenizer=tokenizer)
    extra = 0 if kind == "rev" else 1
    lengths = {len(task.problem(index).digits) - extra for index in range(100)}
    assert lengths == {shortest, shortest + 1, shortest + 2}


@pytest.mark.parametrize("kind", ["chain", "op", "rev"])
def test_prompts_do_not_depend_on_the_batch(tokenizer, kind: str) -> None:
    task = ArithmeticTask(kind=kind, terms=(3, 4), seed=3, tokenizer=tokenizer)
    whole = task.prompts(0, 40)
    assert [prompt.index for prompt in whole] == list(range(40))
    backwards = [task.prompts(index, 1)[0] for index in reversed(range(40))]
    assert backwards[::-1] == whole
    assert ArithmeticTask(kind=kind, terms=(3, 4), seed=3, tokenizer=tokenizer).prompts(17, 9) == whole[17:26]
    assert len({prompt.text for prompt in whole}) > 30


def test_the_stream_is_the_one_of_the_published_runs(tokenizer) -> None:
    """Literal: a change of the generator changes what every earlier run trained on."""
    task = ArithmeticTask(kind="chain", terms=(3, 4), seed=0, tokenizer=tokenizer)
    assert [task.problem(index).question for index in range(3)] == STREAM_SEED_0


STREAM_SEED_0 = ["calc8-3-5+3-1", "calc5-0+0-3", "calc4+5-7+7"]


def test_seeds_and_kinds_are_different_streams(tokenizer) -> None:
    def texts(kind: str, seed: int) -> list[str]:
        task = ArithmeticTask(kind=kind, terms=(4, 4), seed=seed, tokenizer=tokenizer)
        return [prompt.text for prompt in task.prompts(0, 20)]

    assert texts("chain", 0) != texts("chain", 1)
    assert texts("chain", 0) != texts("op", 0)


@pytest.mark.parametrize(
    ("kind", "terms", "named"),
    [
        ("sum", (3, 4), "kind: .*'sum'.*chain, op, rev"),
        ("chain", (4, 3), r"terms: \[4, 3\]"),
        ("chain", (0, 3), r"terms: \[0, 3\]"),
        ("rev", (3,), r"terms: \[3\]"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, kind: str, terms: tuple[int, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ArithmeticTask(kind=kind, terms=terms, seed=0, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("5+4=9-1=8\\boxed{8}<eos>", 1.0),
        ("\\boxed{8}<eos>", 1.0),
        ("7=7\\boxed{1}\\boxed{8}<eos>", 1.0),
        ("\\boxed{8}\\boxed{1}<eos>", 0.0),
        ("5+4=9-1=8\\boxed{8}", 0.0),
        ("5+4=9-1=8\\boxed{8", 0.0),
        ("5+4=9-1=8\\boxed{8<eos>", 0.0),
        ("\\boxed{8}8<eos>", 0.0),
        ("\\boxed{8}<|reserved_0|><eos>", 0.0),
        ("\\boxed{8<|reserved_0|>}<eos>", 0.0),
        ("\\boxed{8}<|im_end|>", 0.0),
        ("\\boxed{8}<pad>", 0.0),
        ("\\boxed{8}<eos><eos>", 0.0),
        ("\\boxed{88}<eos>", 0.0),
        ("\\boxed{7}<eos>", 0.0),
        ("8<eos>", 0.0),
        ("8}<eos>", 0.0),
        ("<eos>", 0.0),
        ("", 0.0),
    ],
)
def test_verifier_wants_the_box_and_the_end_at_the_very_end(tokenizer, response: str, reward: float) -> None:
    task = ArithmeticTask(kind="chain", terms=(3, 4), seed=0, tokenizer=tokenizer)
    prompt = Prompt(index=0, token_ids=(2, 3), text="", answer="8")
    assert task.verify([Response(prompt, tokenizer.encode(response))]) == Verdicts(rewards=[reward])


def test_verifier_compares_all_digits_of_a_reversal(tokenizer) -> None:
    task = ArithmeticTask(kind="rev", terms=(3, 4), seed=0, tokenizer=tokenizer)
    prompt = Prompt(index=0, token_ids=(2, 3), text="", answer="2413")
    assert task.is_right(tokenizer.encode("\\boxed{2413}<eos>"), prompt.answer)
    assert not task.is_right(tokenizer.encode("\\boxed{413}<eos>"), prompt.answer)
    assert not task.is_right(tokenizer.encode("\\boxed{12413}<eos>"), prompt.answer)


def test_every_prompt_is_solved_by_its_own_answer(tokenizer) -> None:
    for kind in ArithmeticKind:
        task = ArithmeticTask(kind=kind, terms=(1, 5), seed=2, tokenizer=tokenizer)
        for prompt in task.prompts(0, 20):
            completion = tokenizer.encode(f"\\boxed{{{prompt.answer}}}<eos>")
            assert tokenizer.unk_token_id not in (*prompt.token_ids, *completion)
            assert task.is_right(completion, prompt.answer)


def test_the_module_needs_no_torch() -> None:
    """A login node without torch can draw problems; importing torch would cost seconds."""
    modules = "megatron_klrl.tasks.sources, megatron_klrl.tasks.verifiers"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
