"""What vLLM samples, and the log-probabilities it reports, against probabilities written out from transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_klrl.generation.engine import Request, Sampling
from megatron_klrl.generation.vllm_engine import VLLMEngine
from tests.generation.cases import EOS, LOGPROB_ATOL, REQUESTS, SAMPLING, assert_sampled_from, distribution, oracle

KINDS = {
    "plain": SAMPLING,
    "cool": replace(SAMPLING, temperature=0.7),
    "top_p": replace(SAMPLING, top_p=0.8),
    "top_k": replace(SAMPLING, top_k=3),
    "all": replace(SAMPLING, temperature=1.4, top_p=0.7, top_k=6),
    "greedy": replace(SAMPLING, temperature=0.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reported_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VLLMEngine, folder: Path, kind: str
) -> None:
    found = engine.generate(REQUESTS, KINDS[kind])
    model = oracle(folder)
    assert_sampled_from(model, REQUESTS, found, KINDS[kind])
    if KINDS[kind].top_k or KINDS[kind].top_p < 1:
        with pytest.raises(AssertionError, match="not close"):  # the cut must matter, else this test shows nothing
            assert_sampled_from(model, REQUESTS, found, replace(KINDS[kind], top_p=1.0, top_k=None))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_tokens_are_drawn_as_often_as_their_probability_says(engine: VLLMEngine, folder: Path, kind: str) -> None:
    prompt, draws = (2,), 4000
    sampling = replace(KINDS[kind], max_tokens=1)
    found = engine.generate([Request(prompt_ids=prompt, seed=seed) for seed in range(draws)], sampling)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=32).double()
    with torch.no_grad():
        probabilities = distribution(oracle(folder)(torch.tensor([prompt])).logits[0, -1], sampling).double().exp()
    assert (probabilities > 0.05).sum() >= 2, "a certain token would show nothing"
    deviation = (counts - draws * probabilities) / (draws * probabilities * (1 - probabilities)).sqrt()
    often = draws * probabilities > 10  # rarer counts are not normally distributed
    assert float(deviation[often].abs().max()) < 4.5  # standard deviations; fixed seeds
    assert counts[~often].sum() < 3 * draws * probabilities[~often].sum() + 1


def test_samples_depend_on_the_seed_alone(engine: VLLMEngine) -> None:
    """Not on the order, the batch, the engine's share of it, what the cache holds or how many wait."""
    together = [c.token_ids for c in engine.generate(REQUESTS, SAMPLING)]
    backwards = engine.generate(REQUESTS[::-1], SAMPLING)[::-1]
    one_by_one = [engine.generate([request], SAMPLING)[0] for request in REQUESTS]
    shares = [c for start in (0, 5, 10) for c in engine.generate(REQUESTS[start : start + 5], SAMPLING)]
    others = [Request(prompt_ids=(2, 4 + i % 9, 3), seed=i) for i in range(150)]
    crowded = engine.generate([*others[:75], *REQUESTS, *others[75:]], SAMPLING)[75 : 75 + len(REQUESTS)]
    for found in (backwards, one_by_one, shares, crowded):
        assert [c.token_ids for c in found] == together
    other = engine.generate([Request(prompt_ids=r.prompt_ids, seed=r.seed + 1000) for r in REQUESTS], SAMPLING)
    assert [c.token_ids for c in other] != together


def test_stop_and_length(engine: VLLMEngine) -> None:
    found = engine.generate(REQUESTS, replace(SAMPLING, max_tokens=4))
    for completion in found:
        assert len(completion.token_ids) == len(completion.logprobs)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == EOS, "the stop token belongs to the response"
        else:
            assert len(completion.token_ids) == 4
            assert EOS not in completion.token_ids
    assert {c.finish_reason for c in found} == {"stop", "length"}, "this test must see both"


def test_no_other_token_ends_a_response(engine: VLLMEngine) -> None:
    """The folder's generation_config.json names an end-of-sequence token; who samples decides all the same."""
    without = engine.generate(REQUESTS, replace(SAMPLING, stop_ids=()))
    assert {(c.finish_reason, len(c.token_ids)) for c in without} == {("length", SAMPLING.max_tokens)}
    assert any(EOS in c.token_ids[:-1] for c in without), "the token must come up for this to show anything"


def test_the_context_ends_a_response(engine: VLLMEngine) -> None:
    long = Request(prompt_ids=(2, *(5,) * 219), seed=1)
    (found,) = engine.generate([long], Sampling(temperature=1.0, max_tokens=50, stop_ids=()))
    assert (found.finish_reason, len(found.token_ids)) == ("length", 224 - 220)


def test_given_tokens_are_scored_at_temperature_one(engine: VLLMEngine, folder: Path) -> None:
    rows = [(2, 5, 9, 10, 3, 7, 8), (2, 6, 11)]
    model = oracle(folder)
    for row, found in zip(rows, engine.score(rows), strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([row[:-1]])).logits[0], -1)
        expected = expected.gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=LOGPROB_ATOL)
    assert engine.score([]) == []
