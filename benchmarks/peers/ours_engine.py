"""This project: the generation engine's log-probabilities of tokens that exist."""

from collections.abc import Callable

import torch

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import Replay
from megatron_klrl.generation.vllm_engine import EngineSettings, VLLMEngine
from megatron_klrl.runtime.world import World

Step = Callable[[], Answer]
_CACHE_BYTES = {"cpu": 64 << 20, "cuda": 8 << 30}


def score(work: Replay, *, quantised: bool = False) -> Step:
    """What the engine says of the completions at temperature 1, with the policy's weights.

    Args:
        work: the rows.
        quantised: weights rounded to 8 bits.
    """
    rows = [tuple(prompt + row) for prompt, row in zip(work.prompts, work.completions, strict=True)]
    engine = VLLMEngine(
        folder=work.policy,
        world=World(rank=0, size=1, local_rank=0, device=work.device, one_machine=True),
        settings=EngineSettings(
            tensor=1,
            dtype=work.dtype,
            max_model_len=max(map(len, rows)) + 1,
            max_num_seqs=64,
            kv_cache_bytes=_CACHE_BYTES[work.device.type],
            timeout_s=300.0,
            sleeps=False,
            quantised=quantised,
        ),
    )

    def step() -> Answer:
        found = engine.score(rows)
        kept = [line[len(prompt) - 1 :] for prompt, line in zip(work.prompts, found, strict=True)]
        return work.scored(torch.tensor([value for line in kept for value in line]))

    return step
