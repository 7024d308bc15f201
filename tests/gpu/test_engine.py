"""vLLM beside the trainer on one device: weights arrive bit for bit, memory is given back and taken again."""

from pathlib import Path

import pytest
import torch

from megatron_klrl.assets import embedded_model
from megatron_klrl.generation.engine import Memory, Request, Sampling
from megatron_klrl.generation.vllm_engine import EngineSettings, VLLMEngine
from tests.gpu.programs import on_device
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer

SAMPLING = Sampling(temperature=1.0, max_tokens=16, stop_ids=(1,))
REQUESTS = [Request(prompt_ids=(2, 3 + number, 4), seed=number) for number in range(8)]


def life(folder: Path) -> dict[str, object]:
    """A trainer and a sleeping engine: sample, sleep, train, wake, refit, sample."""
    with trainer(folder, dtype=torch.bfloat16) as engine:
        device = engine.world.device
        settings = EngineSettings(
            tensor=1,
            dtype=torch.bfloat16,
            max_model_len=64,
            max_num_seqs=16,
            kv_cache_bytes=1 << 30,
            timeout_s=120.0,
            sleeps=True,
        )
        sampler = VLLMEngine(folder=folder, world=engine.world, settings=settings)
        first = sampler.generate(REQUESTS, SAMPLING)
        free_awake = torch.cuda.mem_get_info(device)[0]
        sampler.sleep()
        free_asleep = torch.cuda.mem_get_info(device)[0]
        batch = on_device(rollout_batch(vocab_size=32), device)
        engine.forward_backward(on_device(train_batch(rollout_batch(vocab_size=32)), device), policy_loss(batch))
        engine.optim_step()
        sampler.wake(Memory.WEIGHTS)
        report = sampler.update_weights(engine.export_weights(), version=1, verify=True)
        sampler.wake(Memory.KV_CACHE)
        second = sampler.generate(REQUESTS, SAMPLING)
        again = sampler.generate(REQUESTS, SAMPLING)
        row = (2, *second[0].token_ids)
        return {
            "given_back": free_asleep - free_awake,
            "arrived": dict(report.checksums or {}) == engine.weight_checksums(),
            "first": [one.token_ids for one in first],
            "second": [one.token_ids for one in second],
            "again": [one.token_ids for one in again],
            "scored": len(sampler.score([row])[0]) == len(row) - 1,
        }


@pytest.mark.timeout(600)
def test_an_engine_sleeps_wakes_and_takes_weights() -> None:
    (found,) = run_ranks(1, life, embedded_model("arithmetic"))
    assert found["given_back"] >= 1 << 30, "at least the cache"  # type: ignore[operator]
    assert found["arrived"]
    assert found["second"] == found["again"], "the same seeds"
    assert found["scored"]
