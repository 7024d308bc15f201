"""Requests driven step by step: aborted, stalled, asleep, and open while weights change."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klrl.errors import WorkError
from megatron_klrl.generation.engine import Completion, Memory
from megatron_klrl.generation.vllm_engine import VLLMEngine
from tests.generation.cases import (
    LOGPROB_ATOL,
    REQUESTS,
    SAMPLING,
    assert_sampled_from,
    exact_logprobs,
    oracle,
    perturbed,
)
from tests.generation.conftest import named_weights

LONG = replace(SAMPLING, max_tokens=20, stop_ids=())


def finish(engine: VLLMEngine, tickets: list[str]) -> dict[str, Completion]:
    """Step until every one of these requests has ended."""
    found: dict[str, Completion] = {}
    while not found.keys() >= set(tickets):
        found |= engine.step()
    return found


def without_logprobs(completions: list[Completion]) -> list[Completion]:
    """What does not depend on which requests share a batch; on some processors the last bits of a sum do."""
    return [replace(completion, logprobs=()) for completion in completions]


def test_steps_give_what_generate_gives(engine: VLLMEngine) -> None:
    """Bit for bit: the same requests are in each batch."""
    together = engine.generate(REQUESTS, SAMPLING)
    tickets = engine.submit(REQUESTS, SAMPLING)
    found = finish(engine, tickets)
    assert [found[ticket] for ticket in tickets] == together
    assert engine.step() == {}


def test_requests_that_come_later_are_answered_alike(engine: VLLMEngine, folder: Path) -> None:
    together = engine.generate(REQUESTS, SAMPLING)
    first = engine.submit(REQUESTS[:5], SAMPLING)
    found = engine.step() | engine.step()
    second = engine.submit(REQUESTS[5:], SAMPLING)
    found |= finish(engine, [ticket for ticket in first + second if ticket not in found])
    answers = [found[ticket] for ticket in first + second]
    assert without_logprobs(answers) == without_logprobs(together)
    assert_sampled_from(oracle(folder), REQUESTS, answers)


def test_aborted_requests_keep_what_they_had_written(engine: VLLMEngine, folder: Path) -> None:
    together = engine.generate(REQUESTS, LONG)
    tickets = engine.submit(REQUESTS, LONG)
    for _ in range(4):
        assert engine.step() == {}
    dropped = engine.abort([*tickets[:3], "unknown"])
    for ticket, whole in zip(tickets[:3], together, strict=False):
        assert dropped[ticket].finish_reason == "aborted"
        assert dropped[ticket].token_ids == whole.token_ids[:4]
        assert dropped[ticket].logprobs == whole.logprobs[:4]
    assert len(dropped) == 3
    assert engine.abort(tickets[:3]) == {}
    found = finish(engine, tickets[3:])
    answers = [found[ticket] for ticket in tickets[3:]]
    assert without_logprobs(answers) == without_logprobs(together[3:])
    assert_sampled_from(oracle(folder), REQUESTS[3:], answers, LONG)


def test_generate_refuses_to_run_beside_open_requests(engine: VLLMEngine) -> None:
    tickets = engine.submit(REQUESTS[:2], SAMPLING)
    with pytest.raises(WorkError, match="2 submitted requests are open"):
        engine.generate(REQUESTS, SAMPLING)
    assert engine.abort(tickets).keys() == set(tickets)
    assert engine.generate(REQUESTS[:2], SAMPLING)


def test_weights_updated_under_open_requests(engine: VLLMEngine, folder: Path) -> None:
    """Tokens before the update are the old weights', those after it the new ones', prefix included; each says which."""
    old, new = oracle(folder), oracle(folder, perturbed(folder))
    tickets = engine.submit(REQUESTS, LONG)
    for _ in range(6):
        engine.step()
    engine.update_weights(perturbed(folder), version=7)
    late = engine.submit(REQUESTS[:2], LONG)
    found = finish(engine, tickets + late)
    for request, ticket in zip(REQUESTS, tickets, strict=True):
        completion = found[ticket]
        assert completion.weight_versions == (0,) * 6 + (7,) * 14
        reported = dict(enumerate(completion.logprobs))
        for model, places, other in ((old, range(6), new), (new, range(6, 20), old)):
            right = exact_logprobs(model, request, completion)
            wrong = exact_logprobs(other, request, completion)
            assert max(abs(reported[place] - float(right[place])) for place in places) < LOGPROB_ATOL
            assert max(abs(reported[place] - float(wrong[place])) for place in places) > 1000 * LOGPROB_ATOL
    assert {version for ticket in late for version in found[ticket].weight_versions} == {7}


def test_an_update_that_breaks_off_under_open_requests_holds_them_up(engine: VLLMEngine, folder: Path) -> None:
    tickets = engine.submit(REQUESTS[:2], LONG)
    engine.step()
    with pytest.raises(WorkError, match="lacks"):
        engine.update_weights(named_weights(folder)[1:], version=1)
    with pytest.raises(WorkError, match="incomplete weights"):
        engine.step()
    engine.update_weights(named_weights(folder), version=1)
    assert all(c.weight_versions == (0,) + (1,) * 19 for c in finish(engine, tickets).values())


def test_a_call_without_progress_fails_and_says_where_it_stood(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused scheduler: vLLM's steps return at once and do nothing, for ever."""
    before = engine.generate(REQUESTS, SAMPLING)
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, timeout_s=0.3))
    engine._llm.llm_engine.sleep(level=0)
    start = time.monotonic()
    with pytest.raises(
        WorkError, match=r"generate: no new token for 0.3 s: 12 requests unfinished, 0 of them running.*kv_cache_mib"
    ):
        engine.generate(REQUESTS, SAMPLING)
    assert 0.3 <= time.monotonic() - start < 5
    engine._llm.llm_engine.wake_up(["scheduling"])
    assert engine.generate(REQUESTS, SAMPLING) == before, "nothing was left behind"


def test_a_step_that_does_not_return_writes_its_stack_to_the_log(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    vllm, step = engine._llm.llm_engine, engine._llm.llm_engine.step
    slow = [True]

    def step_that_hangs() -> object:
        if slow.pop() if slow else False:
            time.sleep(1.0)
        return step()

    monkeypatch.setattr(engine, "_settings", replace(engine._settings, timeout_s=0.3))
    monkeypatch.setattr(vllm, "step", step_that_hangs)
    assert engine.generate(REQUESTS, SAMPLING) == before, "slow is not wrong: the step came back with tokens"
    log = capfd.readouterr().err
    assert "generate: no progress for 0.3 s (generation.timeout_s)" in log
    assert "in step_that_hangs" in log
    assert log.count("no progress") == 1


def test_memory_is_given_back_in_order(engine: VLLMEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls and vLLM's own pause, on CPU, where vLLM frees nothing."""
    before = engine.generate(REQUESTS, SAMPLING)
    engine.sleep()
    assert engine.generate(REQUESTS, SAMPLING) == before, "an engine built to keep its memory stays awake"
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, sleeps=True))
    engine.sleep()
    with pytest.raises(WorkError, match="wake kv_cache and weights before"):
        engine.generate(REQUESTS, SAMPLING)
    with pytest.raises(WorkError, match="wake its weights"):
        engine.update_weights(named_weights(folder), version=1)
    engine.wake(Memory.WEIGHTS)
    engine.update_weights(named_weights(folder), version=0)
    with pytest.raises(WorkError, match="wake kv_cache before"):
        engine.generate(REQUESTS, SAMPLING)
    engine.wake(Memory.KV_CACHE)
    assert engine.generate(REQUESTS, SAMPLING) == before
    engine.wake(Memory.KV_CACHE)


def test_weights_that_slept_must_be_pushed_again(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, sleeps=True))
    tickets = engine.submit(REQUESTS[:1], SAMPLING)
    with pytest.raises(WorkError, match="1 submitted requests are open"):
        engine.sleep()
    engine.abort(tickets)
    engine.sleep()
    engine.wake(Memory.WEIGHTS)
    engine.wake(Memory.KV_CACHE)
    with pytest.raises(WorkError, match="incomplete weights"):
        engine.generate(REQUESTS, SAMPLING)
