"""Rows from a file: order, verification, and the message for every way a file can be wrong."""

import json
from pathlib import Path

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.jsonl_file import JsonlTask, read_rows

ROWS = [{"prompt": f"calc{digit}+0", "answer": str(digit)} for digit in range(10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def _answers(task: JsonlTask, start: int, count: int) -> str:
    return "".join(prompt.answer for prompt in task.prompts(start, count))


def test_unshuffled_order_is_the_file_again_and_again(path: Path, tokenizer) -> None:
    task = JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=False)
    assert len(task) == 10
    assert _answers(task, 0, 25) == "0123456789012345678901234"
    assert [prompt.index for prompt in task.prompts(8, 4)] == [8, 9, 10, 11]


def test_each_shuffled_epoch_is_a_permutation_of_its_own(path: Path, tokenizer) -> None:
    task = JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=True)
    epochs = [_answers(task, 10 * epoch, 10) for epoch in range(4)]
    assert all(sorted(epoch) == list("0123456789") for epoch in epochs)
    assert len(set(epochs)) == 4


def test_the_stream_depends_on_seed_and_index_only(path: Path, tokenizer) -> None:
    task = JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=True)
    one_by_one = [task.prompts(index, 1)[0] for index in reversed(range(30))][::-1]
    assert JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=True).prompts(0, 30) == one_by_one
    other = JsonlTask(path=path, tokenizer=tokenizer, seed=1, shuffle=True)
    assert _answers(other, 0, 30) != _answers(task, 0, 30)


def test_prompts_go_through_the_chat_template(path: Path, tokenizer) -> None:
    prompt = JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=False).prompts(7, 1)[0]
    assert prompt.text == "<|im_start|>calc7+0<|im_end|>"
    assert tokenizer.decode(list(prompt.token_ids)) == prompt.text


@pytest.mark.parametrize(
    ("response", "finish_reason", "reward"),
    [
        ("7+0=7\\boxed{7}<eos>", "stop", 1.0),
        ("\\boxed{3}\\boxed{7}<eos>", "stop", 1.0),
        ("\\boxed{7}\\boxed{3}<eos>", "stop", 0.0),
        ("\\boxed{7}+0=7", "length", 1.0),
        ("\\boxed{7", "length", 0.0),
        ("\\boxed{7<eos>", "stop", 0.0),
        ("7<eos>", "stop", 0.0),
        ("\\boxed{77}<eos>", "stop", 0.0),
        ("\\boxed{}<eos>", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_the_last_balanced_box_decides(path: Path, tokenizer, response: str, finish_reason: str, reward: float) -> None:
    task = JsonlTask(path=path, tokenizer=tokenizer, seed=0, shuffle=False)
    prompt = task.prompts(7, 1)[0]
    assert task.verify(prompt, tokenizer.encode(response), finish_reason) == reward


def test_surrounding_space_blank_lines_a_byte_order_mark_and_further_keys_are_harmless(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"prompt": "a\u2028b", "answer": " 5\\n", "level": 3}\r\n\n', encoding="utf-8-sig")
    assert read_rows(file) == (("a\u2028b", "5"),)


@pytest.mark.parametrize(
    ("content", "problem", "fix"),
    [
        ("", "has no rows", "write one object a line"),
        ("\n  \n", "has no rows", "write one object a line"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', "row 2 of .*rows.jsonl is not JSON", "write an object like"),
        ('\n["a", "1"]\n', "row 2 of .* is .*, not an object", "write an object like"),
        ('{"prompt": "a", "anwser": "1"}\n', "row 1 of .* has no key 'answer'", "found: prompt, anwser"),
        ('{"answer": "1"}\n', "row 1 of .* has no key 'prompt'", "found: answer"),
        ("{}\n", "row 1 of .* has no key 'prompt'", "found: nothing"),
        ('{"prompt": "a", "answer": 1}\n', "row 1 of .* has 'answer' = 1, not a string", "put it in quotes"),
        ('{"prompt": ["a"], "answer": "1"}\n', "row 1 of .* has 'prompt' = .*, not a string", "put it in quotes"),
        ('{"prompt": " ", "answer": "1"}\n', "row 1 of .* has an empty 'prompt'", "fill it in"),
        ('{"prompt": "a", "answer": ""}\n', "row 1 of .* has an empty 'answer'", "fill it in"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, content: str, problem: str, fix: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{problem}.*{fix}"):
        read_rows(file)


def test_a_missing_file_a_folder_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist.*give the path"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"is a folder.*give the path"):
        read_rows(tmp_path)
    binary = tmp_path / "rows.jsonl"
    binary.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 \(byte 12\).*save it as UTF-8"):
        read_rows(binary)
