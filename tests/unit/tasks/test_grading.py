"""What counts as right: boxes, letters, and real math-verify on pairs that are known to be delicate."""

from collections.abc import Iterator

import pytest

from megatron_klrl.tasks.grading import Attempt, ChoiceGrader, ExactGrader, FunctionGrader, MathGrader, normalise
from megatron_klrl.tasks.task import Verdicts
from megatron_klrl.tasks.verifier_pool import VerifierPool
from megatron_klrl.tasks.verifiers import FunctionVerifier, MathVerifier


@pytest.fixture(scope="module")
def math_pool() -> Iterator[VerifierPool]:
    pool = VerifierPool(MathVerifier(), workers=1, timeout_s=60.0)
    yield pool
    pool.close()


def rewards(grader, *pairs: tuple[str, str]) -> list[float]:
    return grader.grade([Attempt("", response, answer) for answer, response in pairs]).rewards


def boxed(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(answer, f"so \\boxed{{{box}}}.") for answer, box in pairs]


def test_exact() -> None:
    assert rewards(ExactGrader(), *boxed(("1/2", " 1/2 "), ("1/2", "0.5"), ("1/2", "\\frac12"))) == [1, 0, 0]


@pytest.mark.parametrize("box", ["B", "b", "(B)", "B.", "\\text{B}", "\\textbf{(B)}", "{B}"])
def test_choice_letters(box: str) -> None:
    assert rewards(ChoiceGrader(), *boxed(("B", box), ("C", box))) == [1, 0]


@pytest.mark.parametrize("box", ["", "BC", "B or C", "Bohr", "B: 3", "1"])
def test_what_is_not_one_letter_is_no_choice(box: str) -> None:
    assert rewards(ChoiceGrader(), *boxed(("B", box))) == [0]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("$1,234$", "1234", True),
        ("1\\,000", "1000", True),
        ("5.", "5", True),
        ("2 1/2", "21/2", False),
        ("(1,234)", "(1234)", False),
        ("1,23", "123", False),
        ("\\leftarrow", "arrow", False),
        ("x", "X", False),
    ],
)
def test_typesetting_is_taken_away_and_nothing_else(left: str, right: str, same: int) -> None:
    assert (normalise(left) == normalise(right)) == same


EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("2,1", "\\{1,2\\}"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("10\\%", "0.1"),
    ("1000", "1{,}000"),
    ("\\text{east}", "\\text{East}"),
    ("90^\\circ", "90"),
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("2^{10}", "1024"),
    ("(1,2)", "(1, 2)"),
]
UNEQUAL = [("\\frac{1}{2}", "\\frac{1}{3}"), ("5", "6"), ("\\text{east}", "\\text{west}"), ("(1,2)", "(2,1)")]


def test_math_verify_on_pairs_of_answers(math_pool: VerifierPool) -> None:
    grader = MathGrader(math_pool)
    assert dict(zip(EQUAL, rewards(grader, *boxed(*EQUAL)), strict=True)) == dict.fromkeys(EQUAL, 1.0)
    assert dict(zip(UNEQUAL, rewards(grader, *boxed(*UNEQUAL)), strict=True)) == dict.fromkeys(UNEQUAL, 0.0)


def test_math_verify_is_not_symmetric_and_gets_the_right_answer_first(math_pool: VerifierPool) -> None:
    """An inequality is answered by an interval, but an interval not by an inequality."""
    assert math_pool.score([("1<x<2", "(1,2)"), ("(1,2)", "1<x<2")]).rewards == [1.0, 0.0]


def test_only_the_last_box_counts_and_a_box_is_required(math_pool: VerifierPool) -> None:
    """math-verify by itself makes a set of two boxes, and reads numbers outside of any."""
    half, seven = "\\frac{1}{2}", "7"
    pairs = [
        (half, "first \\boxed{3}, then \\boxed{0.5}"),
        (half, "first \\boxed{0.5}, then \\boxed{3}"),
        (seven, "I think 7"),
        (seven, "7 \\boxed{"),
        (seven, "7 \\boxed{}"),
    ]
    assert rewards(MathGrader(math_pool), *pairs) == [1, 0, 0, 0, 0]


def test_answers_that_cannot_be_read_are_counted_and_compared_as_text(math_pool: VerifierPool) -> None:
    grader = MathGrader(math_pool)
    unreadable = "\\begin{"
    assert math_pool.score([(unreadable, None), ("\\frac{1}{2}", None), ("5", None)]).rewards == [0, 1, 1]
    assert grader.unreadable([unreadable, "\\frac{1}{2}", "-3.5"]) == 1
    assert rewards(grader, *boxed(("\\begin{}", "5"), ("\\text{}", "\\text{}"), ("???", "???"))) == [0, 1, 1]


def test_a_power_that_would_take_forever_is_a_timeout() -> None:
    pool = VerifierPool(MathVerifier(), workers=1, timeout_s=2.0)
    attempts = [Attempt("", response, "5") for response in ("\\boxed{9999999^{9999999}}", "\\boxed{10/2}")]
    found = MathGrader(pool).grade(attempts)
    pool.close()
    assert found == Verdicts(rewards=[0.0, 1.0], timeouts=1, errors=0)


def test_a_users_function_gets_question_response_and_answer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(question: str, response: str, answer: str) -> float:\n"
        "    return len(question) * 100 + len(response) * 10 + len(answer)\n"
    )
    monkeypatch.chdir(tmp_path)
    pool = VerifierPool(FunctionVerifier("my_rewards:length"), workers=1, timeout_s=60.0)
    found = FunctionGrader(pool).grade([Attempt("ab", "c", "def"), Attempt("", "", "")])
    pool.close()
    assert found == Verdicts(rewards=[213.0, 0.0])
