"""Countdown: what is generated can be solved, and what is accepted solves it."""

from itertools import combinations

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.countdown import CountdownTask, Puzzle, solves
from megatron_klrl.tasks.rendering import Framing
from megatron_klrl.tasks.task import Response, Verdicts

PUZZLE = Puzzle((25, 3, 3, 7), 85)


def task(tokenizer, *, seed: int = 0, **changes) -> CountdownTask:
    settings = {"numbers": (3, 4), "largest": 20, "target": (10, 50), "framing": Framing()} | changes
    return CountdownTask(seed=seed, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("25*3+3+7", True),
        ("(25 * 3) + (3 + 7)", True),
        (" 25\\times 3 + 3 + 7 ", True),
        ("\\left(25 \\cdot 3\\right) + 7 + 3", True),
        ("25 × 3 + 7 + 3", True),  # noqa: RUF001
        ("25*3+7", False),  # another value
        ("25*3+3+3+3+1", False),  # 3 three times, and a 1
        ("85", False),  # not among the numbers
        ("17*5", False),
        ("25*3+3+7=85", False),
        ("25*3--3+7", False),
        ("25*3+3+7.0", False),
        ("25*3+3+7 or 1", False),
        ("__import__('os').getpid()", False),
        ("25**3", False),
        ("25//3", False),
        ("25/(3-3)", False),
        ("25*3+3+", False),
        ("", False),
        ("(" * 150 + "7" + ")" * 150, False),
        ("(" * 90 + "7" + ")" * 90, False),
        ("25(3)", False),
        ("025*3+3+7", False),
    ],
)
def test_verifier(expression: str, right: int) -> None:
    assert solves(expression, PUZZLE) == right


def test_fractions_are_exact() -> None:
    assert solves("8 / (3 - 8 / 3)", Puzzle((3, 3, 8, 8), 24))
    assert not solves("1/3*3", Puzzle((1, 3), 1)), "each number once"
    assert solves("(1/49)*49", Puzzle((1, 49, 49), 1)), "0.9999999999999999 in floating point"


def _reachable(values: tuple[int, ...]) -> set[int]:
    """All whole results over whole intermediate ones that use every number; brute force."""
    if len(values) == 1:
        return {values[0]}
    found: set[int] = set()
    for i, j in combinations(range(len(values)), 2):
        rest = tuple(value for place, value in enumerate(values) if place not in {i, j})
        a, b = values[i], values[j]
        results = {a + b, a - b, b - a, a * b}
        results |= {x // y for x, y in ((a, b), (b, a)) if y and x % y == 0}
        found |= {reached for result in results for reached in _reachable((*rest, result))}
    return found


def test_every_puzzle_can_be_solved_and_keeps_to_its_settings(tokenizer) -> None:
    puzzles = [task(tokenizer).puzzle(index) for index in range(150)]
    assert all(puzzle.target in _reachable(puzzle.numbers) for puzzle in puzzles)
    assert {len(puzzle.numbers) for puzzle in puzzles} == {3, 4}
    assert all(
        10 <= puzzle.target <= 50 and 1 <= min(puzzle.numbers) <= max(puzzle.numbers) <= 20 for puzzle in puzzles
    )
    assert len({(puzzle.numbers, puzzle.target) for puzzle in puzzles}) > 140


def test_the_stream_depends_on_seed_and_index_only(tokenizer) -> None:
    first = task(tokenizer).prompts(0, 20)
    assert [task(tokenizer).prompts(index, 1)[0] for index in range(20)] == first
    assert task(tokenizer, seed=1).prompts(0, 20) != first
    # Python keeps the stream of random() fixed, so this puzzle stays what it is.
    assert task(tokenizer).puzzle(0) == PINNED


PINNED = Puzzle((19, 14, 1), 34)


def test_responses_are_read_from_the_last_box(tokenizer) -> None:
    countdown = task(tokenizer, numbers=(2, 2), largest=4, target=(1, 8))
    index = next(index for index in range(400) if countdown.puzzle(index) == Puzzle((4, 3), 7))
    prompt = countdown.prompts(index, 1)[0]
    texts = ["\\boxed{4+3}<eos>", "\\boxed{4-3}<eos>", "4+3<eos>", "\\boxed{4+3"]
    found = countdown.verify([Response(prompt, tokenizer.encode(text)) for text in texts])
    assert found == Verdicts(rewards=[1.0, 0.0, 0.0, 0.0])
    assert prompt.answer == "7"


def test_a_target_out_of_reach_is_said(tokenizer) -> None:
    with pytest.raises(UserError, match=r"no target in \[1000, 1001\].*widen target"):
        task(tokenizer, numbers=(2, 2), largest=5, target=(1000, 1001)).prompts(0, 1)
