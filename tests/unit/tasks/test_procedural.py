"""reasoning-gym: the same entries in every process, its scorer behind a box, its mistakes contained."""

import os
import subprocess
import sys

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.procedural import ProceduralTask, procedural_dataset
from megatron_klrl.tasks.rendering import Framing
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.tasks.verifier_pool import VerifierPool
from megatron_klrl.tasks.verifiers import ReasoningGymVerifier
from tests.unit.tasks.characters import character_tokenizer

NAMES = ("chain_sum", "gcd", "spell_backward", "base_conversion", "number_sorting", "prime_factorization")


def made(name: str, pool: VerifierPool | None = None, *, seed: int = 5) -> ProceduralTask:
    dataset = procedural_dataset(name, size=30, seed=seed, config={}, field="data.train")
    pool = pool or VerifierPool(ReasoningGymVerifier(name), workers=1, timeout_s=60.0)
    return ProceduralTask(dataset, size=30, pool=pool, framing=Framing(), tokenizer=character_tokenizer())


def test_entries_depend_on_seed_and_index_only_and_not_on_the_process() -> None:
    program = (
        "from reasoning_gym import create_dataset\n"
        f"print([create_dataset(name, size=30, seed=5)[i]['question'] for name in {NAMES} for i in (3, 7)])"
    )
    other = {**os.environ, "PYTHONHASHSEED": "4321"}
    elsewhere = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=other)
    here = [made(name).prompts(index, 1)[0].text for name in NAMES for index in (3, 7)]
    assert elsewhere.stdout.strip() == repr(here)
    assert made("chain_sum").prompts(33, 1)[0].text == made("chain_sum").prompts(3, 1)[0].text, "after 30, again"
    assert made("chain_sum", seed=6).prompts(0, 5) != made("chain_sum").prompts(0, 5)


def test_only_the_full_score_counts_and_a_scorer_that_raises_is_counted() -> None:
    pool = VerifierPool(ReasoningGymVerifier("prime_factorization"), workers=1, timeout_s=60.0)
    task = made("prime_factorization", pool)
    prompt = task.prompts(0, 1)[0]
    texts = [f"so \\boxed{{ {prompt.answer} }}", prompt.answer, "\\boxed{nonsense 1}", "\\boxed{2}"]
    found = task.verify([Response(prompt, task._tokenizer.encode(text)) for text in texts])
    pool.close()
    assert found == Verdicts(rewards=[1.0, 0.0, 0.0, 0.0], errors=1)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_sums", {}, "data.train.dataset: reasoning-gym has no data set 'chain_sums'.*chain_sum"),
        ("composite", {}, "data.train.dataset: composite takes objects"),
        ("ransom_note", {}, "data.train.dataset: ransom_note makes other entries in every process.*chain_sum"),
        ("chain_sum", {"min_term": 2}, "data.train.config: chain_sum does not take it: .*min_term"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "data.train.config: chain_sum does not take it: max_terms"),
    ],
)
def test_what_reasoning_gym_does_not_take_is_named(name: str, config: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        procedural_dataset(name, size=3, seed=0, config=config, field="data.train")
