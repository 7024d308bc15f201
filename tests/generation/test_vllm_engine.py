"""vLLM as a guest of the training rank: wrong requests, and what it does to its host."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_klrl.errors import UserError
from megatron_klrl.generation.engine import Request
from megatron_klrl.generation.vllm_engine import VLLMEngine, memory_share
from megatron_klrl.runtime.world import World
from tests.generation.cases import REQUESTS, SAMPLING
from tests.generation.conftest import SETTINGS, Host, fingerprint, named_weights


def test_a_prompt_without_room_for_a_response_is_the_users_error(engine: VLLMEngine) -> None:
    with pytest.raises(UserError, match=r"generation.max_model_len.*prompt of 224 tokens.*Fix"):
        engine.generate([REQUESTS[0], Request(prompt_ids=(2,) * 224, seed=1)], SAMPLING)


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
            world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), one_machine=True),
            settings=replace(SETTINGS, max_model_len=4096),
        )
    assert dist.is_initialized()


def test_an_engine_is_told_to_take_what_is_free() -> None:
    """vLLM starts only where the part of the memory that it is told is free; its own default, nine tenths, is not."""
    gib = 1 << 30
    for free in (139 * gib, 100 * gib, gib):
        share = memory_share(free, total=139 * gib)
        assert 0.89 * free < share * 139 * gib <= free
