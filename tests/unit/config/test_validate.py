from pathlib import Path

import pytest

from megatron_klrl.config.data import ArithmeticSource
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.prompt_lengths import longest_prompt, longest_worked_answer
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import validate
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_folder, make_recipe


def load(tmp_path: Path, *overrides: str) -> Recipe:
    folder = make_folder(tmp_path / "model")
    return load_recipe(make_recipe(tmp_path), [f"model.path={folder}", *overrides])


def test_a_good_recipe_has_no_warnings(tmp_path: Path) -> None:
    assert validate(load(tmp_path), 1) == []
    assert validate(load(tmp_path, "parallel.tensor=2", "parallel.pipeline=2"), 8) == []
    assert validate(load(tmp_path, "parallel.tensor=2", "parallel.sequence=true", "generation.tensor=2"), 2) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "field", "expected"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor", "set parallel.tensor to one of: 1, 2"),
        (["parallel.tensor=4"], 4, "parallel.tensor", "4 does not divide the model's 2 key-value heads"),
        (["parallel.pipeline=3"], 3, "parallel.pipeline", "set parallel.pipeline to one of: 1, 2, 4"),
        (["parallel.context=2"], 3, "parallel", "start 2 ranks"),
        (["parallel.expert=2"], 2, "parallel.expert", "the model has no experts"),
        (["parallel.virtual_pipeline=2"], 2, "parallel.virtual_pipeline", "needs a pipeline to interleave"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
            2,
            "parallel.virtual_pipeline",
            "4 does not divide the model's 2 layers of a stage",
        ),
        (
            ["loop.tokens_per_microbatch=999", "loop.micro_batch_size=4"],
            1,
            "loop.tokens_per_microbatch",
            "both are given",
        ),
        (
            ["weight_sync.transport=in_process", "parallel.tensor=2"],
            2,
            "weight_sync.transport",
            "spread over several ranks",
        ),
        (["weight_sync.transport=disk"], 1, "weight_sync.transport", "weight_sync.folder to a folder"),
        (["weight_sync.folder=here"], 1, "weight_sync.transport", "or neither"),
        (["loop.tokens_per_microbatch=9"], 1, "loop.tokens_per_microbatch", "set it to"),
        (["parallel.sequence=true"], 1, "parallel.sequence", "parallel.tensor to 2 or more"),
        (["parallel.tensor=2"], 3, "parallel", "start 2 ranks"),
        (["parallel.tensor=2", "parallel.pipeline=2"], 2, "parallel", "start 4 ranks"),
        (["generation.tensor=2"], 3, "generation.tensor", "does not divide the 3 ranks"),
        (["generation.tensor=3"], 3, "generation.tensor", "set generation.tensor to one of: 1, 2, 4"),
        (["precision.fp8=mxfp8"], 1, "precision.dtype", "is fp32, but what 8-bit products do not take is bf16"),
        (["loop.max_staleness=1"], 1, "kl", "set kl.correction=prefix"),
        (["loop.updates_per_batch=2"], 1, "kl", "off-policy"),
        (["loop.max_staleness=1", "kl.correction=prefix", "kl.ratio_max=5"], 1, "kl", "set kl.ratio_max=null"),
        (["generation.max_tokens=250"], 1, "generation.max_tokens", "set generation.max_tokens to 244 or less"),
        (["generation.max_model_len=257"], 1, "generation.max_model_len", "set it to 256 or less"),
        (["generation.max_model_len=30"], 1, "generation.max_tokens", "set generation.max_tokens to 18 or less"),
        (["data.eval.id={task: arithmetic, kind: rev, terms: [9, 64], prompts: 1}", "generation.max_tokens=190"],
         1, "generation.max_tokens", "prompts of data.eval.id (up to 67)"),
        (["data.eval.id.temperature=0", "data.eval.id.samples=2"], 1, "data.eval.id.samples", "at temperature 0"),
        (["data.train={task: jsonl, path: /nope.jsonl}"], 1, "data.train.path", "there is no file /nope.jsonl"),
        (["model.path=/nope"], 1, "model.path", "there is no folder /nope"),
        (["kl.estimator=k3"], 1, "kl", "kl.allow_biased=true"),
        (["kl={placement: loss, estimator: k1, credit: token}"], 1, "kl", "does not follow the gradient"),
    ],
)  # fmt: skip
def test_rules_name_field_and_fix(
    tmp_path: Path, overrides: list[str], world_size: int, field: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(load(tmp_path, *overrides), world_size)
    assert caught.value.field == field
    assert caught.value.fix
    assert expected in str(caught.value)


def test_the_fix_of_a_refused_kl_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        validate(load(tmp_path, "kl.estimator=k3"), 1)
    assert caught.value.fix is not None
    settings = caught.value.fix.removeprefix("set ").partition(", or")[0].split()
    assert settings
    assert validate(load(tmp_path, "kl.estimator=k3", *settings), 1) == []


def test_an_allowed_bias_is_a_warning_and_beta_zero_needs_no_permission(tmp_path: Path) -> None:
    (warning,) = validate(load(tmp_path, "kl.estimator=k3", "kl.allow_biased=true"), 1)
    assert warning.startswith("kl.allow_biased: ")
    assert validate(load(tmp_path, "kl.estimator=k3", "kl.beta=0"), 1) == []


def test_files_must_hold_as_many_prompts_as_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    setting = f"data.eval.mine={{task: jsonl, path: {file}, prompts: 3}}"
    file.write_text("\n\n")
    with pytest.raises(UserError, match=r"eval\.jsonl is empty"):
        validate(load(tmp_path, setting), 1)
    file.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match=r"holds 2 prompts.*set data.eval.mine.prompts to 2 or less"):
        validate(load(tmp_path, setting), 1)
    assert validate(load(tmp_path, setting, "data.eval.mine.prompts=2"), 1) == []
    with pytest.raises(UserError, match="is a folder, not a file"):
        validate(load(tmp_path, f"data.train={{task: jsonl, path: {tmp_path}}}"), 1)


def test_answers_that_cannot_fit_are_warned_of(tmp_path: Path) -> None:
    (warning,) = validate(load(tmp_path, "data.eval.id.terms=[5, 6]"), 1)
    assert "data.eval.id take up to 29 tokens, 24 are allowed" in warning


@pytest.mark.parametrize(
    ("kind", "terms", "prompt", "answer"),
    [
        # <|im_start|> calc 5+4-1+1-8 <|im_end|> and 5+4=9-1=8+1=9-8=1 \boxed{ 1 } <eos>
        ("chain", 4, 12, 21),
        ("op", 4, 12, 21),
        # <|im_start|> rev 3142 <|im_end|> and \boxed{ 2413 } <eos>
        ("rev", 4, 7, 7),
    ],
)
def test_lengths_counted_by_hand(kind: str, terms: int, prompt: int, answer: int) -> None:
    source = ArithmeticSource.model_validate({"task": "arithmetic", "kind": kind, "terms": (1, terms)})
    assert longest_prompt(source) == prompt
    assert longest_worked_answer(source) == answer


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("path: nowhere.parquet", r"data\.train\.path: there is nothing at nowhere\.parquet"),
        ("path: ./nowhere", r"data\.train\.path: there is nothing at \./nowhere"),
        ("path: FOLDER/a.txt", r"data\.train\.path: .* is not a table .*\.jsonl, \.parquet"),
        ("path: FOLDER/a.parquet, split: test", r"data\.train\.split: is set, but .* is a file"),
        ("path: FOLDER/a.parquet, subsets: [a]", r"data\.train\.subsets: is set, but .* is a file"),
        ("path: FOLDER, revision: main", r"data\.train\.revision: is set, but .* is on this machine"),
    ],
)
def test_tables_that_cannot_be_read_are_named_before_anything_is_read(tmp_path: Path, keys: str, problem: str) -> None:
    for name in ("a.txt", "a.parquet"):
        (tmp_path / name).write_text("")
    setting = f"data.train={{task: math, {keys.replace('FOLDER', str(tmp_path))}}}"
    with pytest.raises(UserError, match=problem):
        validate(load(tmp_path, setting), 1)


def test_a_name_on_the_hub_is_left_to_be_looked_up(tmp_path: Path) -> None:
    settings = ["data.train={task: gsm8k, path: openai/gsm8k, subsets: [main], revision: e53f048}"]
    assert validate(load(tmp_path, *settings), 1) == []
