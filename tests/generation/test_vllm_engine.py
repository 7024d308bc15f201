"""vLLM as the generation engine: what it samples and reports, what a weight push does, what it does to its host."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.generation.engine import Completion, Request, Sampling
from megatron_klrl.generation.vllm_engine import VLLMEngine
from megatron_klrl.runtime.world import World
from tests.generation.conftest import Host, fingerprint, named_weights

EOS = 1
SAMPLING = Sampling(temperature=1.0, max_tokens=12, stop_ids=(EOS,))
REQUESTS = [Request(prompt_ids=(2, 5 + i % 4, 9, 10, 3), seed=100 + i) for i in range(12)]
# float32 on both sides, other kernels and another order of sums; log-probabilities lie in 0..15
LOGPROB_ATOL = 5e-5


def transformers_logprobs(
    model: torch.nn.Module, request: Request, completion: Completion, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([request.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(request.prompt_ids) - 1 :] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)


def perturbed(folder: Path, seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(n, w + 0.1 * torch.randn(w.shape, generator=generator)) for n, w in named_weights(folder)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VLLMEngine, folder: Path, temperature: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampling = Sampling(temperature=temperature, max_tokens=12, stop_ids=(EOS,))
    for request, completion in zip(REQUESTS, engine.generate(REQUESTS, sampling), strict=True):
        expected = transformers_logprobs(model, request, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=LOGPROB_ATOL)


def test_samples_depend_on_the_seed_alone(engine: VLLMEngine) -> None:
    together = engine.generate(REQUESTS, SAMPLING)
    backwards = engine.generate(REQUESTS[::-1], SAMPLING)[::-1]
    one_by_one = [engine.generate([request], SAMPLING)[0] for request in REQUESTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards] == [c.token_ids for c in one_by_one]
    other = engine.generate([Request(prompt_ids=r.prompt_ids, seed=r.seed + 1000) for r in REQUESTS], SAMPLING)
    assert [c.token_ids for c in other] != [c.token_ids for c in together]


def test_stop_and_length(engine: VLLMEngine) -> None:
    found = engine.generate(REQUESTS, Sampling(temperature=1.0, max_tokens=4, stop_ids=(EOS,)))
    for completion in found:
        assert len(completion.token_ids) == len(completion.logprobs)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == EOS, "the stop token belongs to the response"
        else:
            assert len(completion.token_ids) == 4
            assert EOS not in completion.token_ids
    assert {c.finish_reason for c in found} == {"stop", "length"}, "this test must see both"


def test_pushed_weights_are_what_is_sampled_from(engine: VLLMEngine, folder: Path) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    weights = perturbed(folder)
    engine.update_weights(iter(weights), version=5)
    after = engine.generate(REQUESTS, SAMPLING)
    assert [c.token_ids for c in after] != [c.token_ids for c in before], "changed weights must change the samples"
    assert {c.weight_version for c in after} == {5}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(dict(weights), strict=False)
    for request, completion in zip(REQUESTS, after, strict=True):
        expected = transformers_logprobs(model, request, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=LOGPROB_ATOL)
    engine.update_weights(named_weights(folder), version=6)
    again = engine.generate(REQUESTS, SAMPLING)
    assert [(c.token_ids, c.logprobs) for c in again] == [(c.token_ids, c.logprobs) for c in before]


def broken_update(kind: str, weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    name, tensor = weights[3]
    match kind:
        case "missing":
            return weights[:3] + weights[4:]
        case "unknown":
            return [*weights, ("model.layers.0.extra", tensor)]
        case "repeated":
            return [*weights, (name, tensor)]
        case "shape":
            return [*weights[:3], (name, tensor[:-1]), *weights[4:]]
        case _:
            return [*weights[:3], (name, tensor * float("nan")), *weights[4:]]


@pytest.mark.parametrize("kind", ["missing", "unknown", "repeated", "shape", "nan"])
def test_an_incomplete_update_leaves_the_engine_unusable_until_a_complete_one(
    engine: VLLMEngine, folder: Path, kind: str
) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    weights = named_weights(folder)
    with pytest.raises(WorkError, match="weight update"):
        engine.update_weights(broken_update(kind, weights), version=1)
    with pytest.raises(WorkError, match="incomplete weights"):
        engine.generate(REQUESTS, SAMPLING)
    engine.update_weights(weights, version=2)
    after = engine.generate(REQUESTS, SAMPLING)
    assert [(c.token_ids, c.logprobs) for c in after] == [(c.token_ids, c.logprobs) for c in before]


def test_a_prompt_without_room_for_a_response_is_the_users_error(engine: VLLMEngine) -> None:
    with pytest.raises(UserError, match=r"generation.max_model_len.*prompt of 64 tokens.*Fix"):
        engine.generate([REQUESTS[0], Request(prompt_ids=(2,) * 64, seed=1)], SAMPLING)


def test_a_request_that_breaks_inside_a_step_does_not_block_the_next(engine: VLLMEngine) -> None:
    """A token beyond the vocabulary fails in the forward and leaves its request queued; vLLM would loop for ever."""
    before = engine.generate(REQUESTS, SAMPLING)
    with pytest.raises(IndexError):
        engine.generate([REQUESTS[0], Request(prompt_ids=(2, 9999), seed=1)], SAMPLING)
    assert [c.token_ids for c in engine.generate(REQUESTS, SAMPLING)] == [c.token_ids for c in before]


def test_starting_an_engine_leaves_the_host_as_it_was(host: Host) -> None:
    assert host.after == host.before


def test_sampling_leaves_the_host_as_it_was(engine: VLLMEngine, folder: Path) -> None:
    before = fingerprint()
    engine.generate(REQUESTS, SAMPLING)
    engine.update_weights(named_weights(folder), version=1)
    assert fingerprint() == before


def test_thread_count_can_still_be_set(host: Host) -> None:
    """vLLM replaces torch.set_num_threads by a function that does nothing."""
    del host
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_shared_memory_is_named_by_job(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the external launcher vLLM's own name is the same in every job of a machine."""
    del host
    monkeypatch.setenv("VLLM_DIST_IDENT", "constant")
    from vllm.distributed.device_communicators import cpu_communicator  # noqa: PLC0415  only after the host is prepared

    group = SimpleNamespace(unique_name="tp:0", ranks=[0, 1])
    name = cpu_communicator._CPUSHMDistributed.make_group_name(group)
    assert name.startswith("klrl")
    assert name.endswith("constant-tp:0-[0-1]-cpushm")


def test_a_model_length_that_does_not_fit_is_the_users_error(host: Host, folder: Path) -> None:
    del host
    with pytest.raises(UserError, match="generation"):
        VLLMEngine(
            folder=folder,
            world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
            tensor=1,
            dtype=torch.float32,
            max_model_len=4096,
            max_num_seqs=8,
            kv_cache_bytes=32 << 20,
        )
    assert dist.is_initialized()
