"""Data sets on disk through the datasets library: columns, malformed rows, and the checks before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_klrl.config.data import DataSection, OnBadRow, Source, VerifierSection
from megatron_klrl.config.load import load_recipe
from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rows import Row, RowSet
from megatron_klrl.tasks.sources import check_data, make_task, read_rows
from megatron_klrl.tasks.task import Response
from tests.unit.tasks.characters import character_tokenizer
from tests.unit.tasks.tables import GSM8K, MATH, MATH500, MMLU, write_jsonl, write_parquet

RECIPE = Path(__file__).parents[3] / "examples" / "recipes" / "arithmetic_cpu.yaml"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets converts is kept with the test's files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(task: str, path: Path, **keys: Any) -> RowSet:
    source = TypeAdapter(Source).validate_python({"task": task, "path": str(path), **keys})
    return read_rows(source, field="data.train")


def checked(*settings: str) -> list[str]:
    return check_data(load_recipe(RECIPE, settings))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_math_takes_the_last_box_of_the_solution(tmp_path: Path, write) -> None:
    file = write(tmp_path / f"math.{write.__name__.removeprefix('write_')}", MATH)
    rows = (Row("One half?", "\\frac{1}{2}"), Row("Two?", "2"), Row("Three?", "3"))
    assert read("math", file) == RowSet(rows, total=3, skipped=())
    assert read("math", file, levels=[1, 5]).rows == rows[:2]
    assert read("math", file, levels=[5]).rows == rows[1:2]


def test_math500_has_the_answer_beside_the_solution(tmp_path: Path) -> None:
    assert read("math", write_parquet(tmp_path / "m.parquet", MATH500), levels=[2]).rows == (Row("Four?", "4"),)


def test_gsm8k_takes_what_follows_the_marks(tmp_path: Path) -> None:
    assert read("gsm8k", write_jsonl(tmp_path / "g.jsonl", GSM8K)).rows == (Row("How many clips?", "1072"),)


def test_choices_are_listed_and_answered_by_letter(tmp_path: Path) -> None:
    rows = read("multiple_choice", write_parquet(tmp_path / "m.parquet", MMLU)).rows
    assert rows[0] == Row("Which?\n\nA. p\nB. q\nC. r\nD. s", "C")
    lettered = write_jsonl(tmp_path / "l.jsonl", [{"question": "Which?", "choices": ["p", "q"], "answer": "b"}])
    assert read("multiple_choice", lettered).rows == (Row("Which?\n\nA. p\nB. q", "B"),)


def test_a_folder_in_the_hubs_layout_loads_by_subset_and_split(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    write_parquet(folder / "college_physics" / "test-00000-of-00001.parquet", MMLU)
    write_parquet(folder / "college_biology" / "test-00000-of-00001.parquet", MMLU[:1])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n"
        for name in ("college_physics", "college_biology")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found = read("multiple_choice", folder, subsets=["college_biology", "college_physics"], split="test")
    assert [row.question[:5] for row in found.rows] == ["Which", "Which", "Who?\n"]
    with pytest.raises(UserError, match=r"data.train.path: datasets cannot read .*validation.*subsets and split"):
        read("multiple_choice", folder, subsets=["college_biology"], split="validation")


def test_a_folder_with_jsonl_files_loads_by_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    assert read("gsm8k", tmp_path / "gsm8k", split="test").rows == (Row("How many clips?", "1072"),)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot read nobody/nothing: .*local copy in the hub's layout"):
        read_rows(TypeAdapter(Source).validate_python({"task": "gsm8k", "path": "nobody/nothing"}), field="data.train")


@pytest.mark.parametrize(
    ("task", "bad", "problem"),
    [
        ("math", {"problem": "a", "solution": "no box"}, "has a 'solution' without a boxed answer"),
        ("math", {"problem": "a", "solution": "\\boxed{1"}, "has a 'solution' without a boxed answer"),
        ("math", {"solution": "\\boxed{1}"}, "has no key 'problem'.*found: solution"),
        ("gsm8k", {"question": "a", "answer": "72"}, "has an 'answer' without '#### result'"),
        ("gsm8k", {"question": "a", "answer": "so #### "}, "has an 'answer' without '#### result'"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "has an empty 'question'"),
        ("multiple_choice", {"question": "a", "choices": ["p"], "answer": 0}, "has no list 'choices' of 2 to 26"),
        ("multiple_choice", {"question": "a", "choices": ["p", ""], "answer": 0}, "has a choice that is not a text"),
        (
            "multiple_choice",
            {"question": "a", "choices": ["p", "q"], "answer": 2},
            "has 'answer' = 2, which is none of",
        ),
        (
            "multiple_choice",
            {"question": "a", "choices": ["p", "q"], "answer": "C"},
            "has 'answer' = \"C\", which is none",
        ),
        ("jsonl", {"prompt": "a", "anwser": "1"}, "has no key 'answer'.*found: prompt, anwser"),
        ("jsonl", {"answer": "1"}, "has no key 'prompt'.*found: answer"),
        ("jsonl", {}, "has no key 'prompt'.*found: nothing"),
        ("jsonl", {"prompt": "a", "answer": 1}, "has 'answer' = 1, not a string.*put it in quotes"),
        ("jsonl", {"prompt": ["a"], "answer": "1"}, "has 'prompt' = .*, not a string.*put it in quotes"),
        ("jsonl", {"prompt": "a", "answer": " "}, "has an empty 'answer'.*fill it in"),
    ],
)
def test_malformed_rows_are_named_with_file_and_row_or_skipped_and_counted(
    tmp_path: Path, task: str, bad: dict[str, object], problem: str
) -> None:
    good = {"math": MATH[0], "gsm8k": GSM8K[0], "multiple_choice": MMLU[0], "jsonl": {"prompt": "a", "answer": "1"}}
    file = write_jsonl(tmp_path / "rows.jsonl", [good[task], bad, good[task]])
    with pytest.raises(UserError, match=f"data.train: row 2 of {file} {problem}"):
        read(task, file)
    found = read(task, file, on_bad_row=OnBadRow.SKIP)
    assert (len(found.rows), found.total, len(found.skipped)) == (2, 3, 1)
    assert found.skipped[0].startswith(f"row 2 of {file} ")
    with pytest.raises(UserError, match=r"none of the 1 rows of .* can be used; the first: row 1"):
        read(task, write_jsonl(tmp_path / "bad.jsonl", [bad]), on_bad_row=OnBadRow.SKIP)


def test_malformed_rows_of_parquet_are_named_too(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "rows.parquet", [*GSM8K, {"question": "a", "answer": "72"}])
    with pytest.raises(UserError, match=f"row 2 of {file} has an 'answer' without"):
        read("gsm8k", file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no rows.*write one question a row"),
        ("\n  \n", "has no rows.*write one question a row"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', "row 2 of .*rows.jsonl is not JSON.*write one object a line"),
        ('\n["a", "1"]\n', "row 2 of .* is .*, not an object.*write an object like"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        read("jsonl", file)


def test_surrounding_space_blank_lines_a_byte_order_mark_and_further_keys_are_harmless(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"prompt": "a\u2028b", "answer": " 5\\n", "level": 3}\r\n\n', encoding="utf-8-sig")
    assert read("jsonl", file).rows == (Row("a\u2028b", "5"),)


def test_a_missing_file_a_folder_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist.*give the path"):
        read("jsonl", tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"is a folder.*give the path"):
        read("jsonl", tmp_path)
    binary = tmp_path / "rows.jsonl"
    binary.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 \(byte 12\).*save it as UTF-8"):
        read("jsonl", binary)


def test_everything_is_checked_before_an_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "g.jsonl", [*GSM8K, {"question": "a", "answer": "72"}])
    assert checked(f"data.train={{task: gsm8k, path: {file}, on_bad_row: skip}}") == [
        f"data.train: 1 of 2 rows are skipped; the first: row 2 of {file} has an 'answer' without '#### result'"
    ]
    with pytest.raises(UserError, match=r"data.eval.own.prompts: is 2, but .* holds 1 prompts"):
        checked(f"data.eval.own={{task: gsm8k, path: {file}, on_bad_row: skip, prompts: 2}}")
    with pytest.raises(UserError, match=r"data.train.dataset: reasoning-gym has no data set 'nothing'"):
        checked("data.train={task: reasoning_gym, dataset: nothing}")
    with pytest.raises(UserError, match=r"data.train.target: \[101, 102\] is out of reach of 2 numbers up to 10"):
        checked("data.train={task: countdown, numbers: [2, 3], largest: 10, target: [101, 102]}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "def fine(question, response, answer): return 1.0\ndef narrow(response): return 1.0\n"
    )
    own = f"data.train={{task: jsonl, path: {write_jsonl(tmp_path / 'p.jsonl', [{'prompt': 'a', 'answer': '1'}])}"
    assert checked(f"{own}, reward: 'own_rewards:fine'}}") == []
    for reward, problem in {
        "own_rewards:narrow": "missing|unexpected.*define it as def narrow",
        "own_rewards:fin": "has no function 'fin'.*functions of own_rewards: fine, narrow",
        "own_reward:fine": "cannot import own_reward .*module:function",
        "approx": "'approx' is no reward; write exact, math, or module:function",
    }.items():
        with pytest.raises(UserError, match=problem):
            checked(f"{own}, reward: '{reward}'}}")


def task_of(tmp_path: Path, *, room: int, **keys: Any):
    rows = [{"prompt": "short", "answer": "1/2"}, {"prompt": "a long one", "answer": "\\begin{"}]
    raw = {"task": "jsonl", "path": str(write_jsonl(tmp_path / "p.jsonl", rows)), **keys}
    section = DataSection.model_validate({"train": raw})
    return make_task(
        section.train,
        field="data.train",
        tokenizer=character_tokenizer(),
        verifier=VerifierSection(workers=1, timeout_s=60.0),
        seed=0,
        shuffle=False,
        room=room,
    )


def test_prompts_must_leave_room_for_the_response(tmp_path: Path) -> None:
    assert len(task_of(tmp_path, room=10)) == 2
    with pytest.raises(
        UserError, match=r"1 of 2 prompts are longer than the 9 tokens.*longest 10; .*prompt 2: 'a long"
    ):
        task_of(tmp_path, room=9)
    skipping = task_of(tmp_path, room=9, on_bad_row="skip")
    assert len(skipping) == 1
    assert skipping.notes == ("data.train: 1 of 2 prompts are skipped: longer than 9 tokens",)
    with pytest.raises(UserError, match="no prompt is as short as 4 tokens"):
        task_of(tmp_path, room=4, on_bad_row="skip")


def test_a_whole_math_task(tmp_path: Path) -> None:
    task = task_of(tmp_path, room=99, reward="math", instruction="Box it.")
    assert task.notes == ("data.train: math-verify cannot read 1 of 2 answers; they are compared as text",)
    prompts = task.prompts(0, 3)
    assert [prompt.text for prompt in prompts] == ["short\n\nBox it.", "a long one\n\nBox it.", "short\n\nBox it."]
    tokenizer = character_tokenizer()
    texts = ["so \\boxed{0.5}", "\\boxed{5}", "\\boxed{\\frac{1}{3}}"]
    responses = [Response(prompt, tokenizer.encode(text)) for prompt, text in zip(prompts, texts, strict=True)]
    assert task.verify(responses).rewards == [1.0, 0.0, 0.0]
