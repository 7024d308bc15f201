"""Rules on algorithm, loop, kl_control and reference: each names its key and a fix."""

from pathlib import Path

import pytest

from megatron_klrl.config.describe import kl_verdict, objective_text
from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import validate
from megatron_klrl.errors import UserError
from tests.unit.config.folders import make_recipe

STALE = ("loop.max_staleness=4", "kl.correction=prefix")


def load(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(make_recipe(tmp_path), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        (["loop.group_size=1"], "loop.group_size", "2 or more"),
        (["loop.updates_per_batch=3", "loop.prompts_per_step=4"], "loop.updates_per_batch", "one of: 1, 2, 4"),
        (["algorithm.ratio_to=rollout"], "algorithm.ratio_to", "reinforce has no ratio"),
        (
            ["algorithm.ratio_to=rollout", "algorithm.surrogate=ppo_clip", "mismatch.correction=token_mask"],
            "algorithm.ratio_to",
            "correct again",
        ),
        (["algorithm.norm_length=5"], "algorithm.norm_length", "constant_norm"),
        (["algorithm.overlong=penalty"], "algorithm.overlong_buffer", "is missing"),
        (["algorithm.overlong_buffer=2"], "algorithm.overlong_buffer", "overlong=keep has no buffer"),
        (["algorithm.overlong=penalty", "algorithm.overlong_buffer=99"], "algorithm.overlong_buffer", "or less"),
        (
            ["algorithm.dynamic_sampling_rounds=1", "loop.group_size=1", "algorithm.advantage=reinforce"],
            "algorithm.dynamic_sampling_rounds",
            "every group of one",
        ),
        (["kl_control.kind=linear"], "kl_control.final", "is missing"),
        (["kl_control.kind=target"], "kl_control.target", "is missing"),
        (["kl_control.final=0.1"], "kl_control.final", "kind=fixed has none"),
        (["kl_control.kind=target", "kl_control.target=1", "kl_control.steps=3"], "kl_control.steps", "has none"),
        (["kl_control.kind=target", "kl_control.target=1", "kl.beta=0"], "kl_control.kind", "above 0"),
        (["kl_control.kind=target", "kl_control.target=1", "kl_control.low=1"], "kl.beta", "outside of"),
        (["reference.reset_every=2", "kl.beta=0"], "reference.reset_every", "kl.beta above 0"),
        (["reference.reset_every=2", "reference.ema=0.9"], "reference.ema", "both set"),
        (["reference.reset_every=2", "optimum.prompts=1"], "optimum.prompts", "fixed beta"),
        (["reference.path=/nope"], "reference.path", "there is no folder /nope"),
        (["checkpoint.keep_best=reward/mean"], "checkpoint.keep_best", "all checkpoints stay"),
        (["checkpoint.keep=1", "checkpoint.keep_best=eval/other/accuracy"], "checkpoint.keep_best", "eval/id/accuracy"),
        (["checkpoint.keep=1", "checkpoint.keep_best=eval/id/stderr"], "checkpoint.keep_best", "is not measured"),
    ],
)
def test_rules_name_field_and_fix(tmp_path: Path, overrides: list[str], field: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load(tmp_path, *overrides), 1)
    assert caught.value.field == field
    assert caught.value.fix
    assert expected in str(caught.value)


def test_a_baseline_without_siblings_takes_groups_of_one(tmp_path: Path) -> None:
    for advantage in ("reinforce", "reinforce_pp"):
        assert validate(load(tmp_path, "loop.group_size=1", f"algorithm.advantage={advantage}"), 1) == []


def test_stale_rollouts_warn_of_what_misleads(tmp_path: Path) -> None:
    reward, gradient = validate(load(tmp_path, *STALE), 1)
    assert reward.startswith("loop.max_staleness: reward/mean is that of a policy 4 updates old")
    assert "no importance weights" in gradient
    evaluated = ("loop.eval_every=5", "data.eval.id={task: arithmetic, kind: chain, terms: [2, 3], prompts: 4}")
    assert validate(load(tmp_path, *STALE, *evaluated, "mismatch.correction=token_truncate"), 1) == []


def test_a_ratio_that_is_always_one_is_said(tmp_path: Path) -> None:
    surrogate = "algorithm.surrogate=ppo_clip"
    warned = validate(load(tmp_path, *STALE, surrogate), 1)
    assert any(text.startswith("algorithm.ratio_to: with one update per batch") for text in warned)
    for remedy in ("algorithm.ratio_to=rollout", "mismatch.correction=token_truncate"):
        warned = validate(load(tmp_path, *STALE, surrogate, remedy), 1)
        assert not any(text.startswith("algorithm.ratio_to") for text in warned)


def test_checkpoints_without_an_evaluation_of_their_own_are_said_to_be_none_of_the_best(tmp_path: Path) -> None:
    best = ("checkpoint.keep=1", "checkpoint.keep_best=eval/id/accuracy", "loop.checkpoint_every=4")
    for every, count in ((0, 1), (3, 1), (4, 0), (2, 0)):
        warned = validate(load(tmp_path, *best, f"loop.eval_every={every}"), 1)
        assert len([text for text in warned if text.startswith("checkpoint.keep_best: ")]) == count, every
    assert validate(load(tmp_path, "checkpoint.keep=1", "checkpoint.keep_best=reward/mean"), 1) == []


def test_the_run_says_what_it_pursues(tmp_path: Path) -> None:
    assert kl_verdict(load(tmp_path, *STALE)).endswith("sequence-level KL off-policy")
    assert "biased" in kl_verdict(load(tmp_path, "loop.max_staleness=1", "kl.allow_biased=true"))
    steered = objective_text(load(tmp_path, "kl_control.kind=target", "kl_control.target=2", "reference.reset_every=5"))
    assert "steered to a KL of 2 nats" in steered
    assert "reset to the policy every 5 steps" in steered
