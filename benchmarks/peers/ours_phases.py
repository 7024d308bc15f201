"""This project: the four phases of a train step, each as a contestant of its own, with both real engines."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.peers.ours_step import batching, replay_recipe, rollouts, trainer
from benchmarks.workloads.whole_step import WholeStep
from megatron_klrl.generation.engine import Request, Sampling
from megatron_klrl.generation.vllm_engine import EngineSettings, VLLMEngine
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.mcore.engine import MegatronEngine
from megatron_klrl.runtime.world import World

Step = Callable[[], Answer]
_KV_CACHE_BYTES = 64 << 20
_TIMEOUT_S = 120.0


def generate(work: WholeStep) -> Step:
    """vLLM completes every row's prompt to the longest length."""
    engine = _vllm(work)
    return lambda: Answer(values={"greedy_tokens": _decoded(engine, work)})


def score(work: WholeStep) -> Step:
    """Policy and reference without gradient: log-probabilities, entropy, full-vocabulary KL."""
    batch, engine = rollouts(work), _megatron(work)

    def step() -> Answer:
        scores = engine.score(batch)
        assert scores.ref_logprobs is not None  # the engine was built with a reference
        old, ref = (work.padded(each[batch.response_mask]) for each in (scores.old_logprobs, scores.ref_logprobs))
        return Answer(values={"old_logprobs": old, "ref_logprobs": ref})

    return step


def train(work: WholeStep) -> Step:
    """Advantages, loss, gradient, clipping, Adam; the scores are those of the first call's policy."""
    recipe, batch, engine = replay_recipe(work), rollouts(work), _megatron(work)
    scores = engine.score(batch)

    def step() -> Answer:
        update = assemble(batch, scores, recipe, advantages=work.advantages)
        report = engine.forward_backward(update, policy_loss(recipe, update))
        norm = engine.optim_step().grad_norm
        return Answer(values={"loss": torch.tensor([report.loss]), "grad_norm": torch.tensor([norm])})

    return step


def sync(work: WholeStep) -> Step:
    """The trainer's weights into the engine, as after every update. That they arrive is shown before the first call.

    Raises:
        RuntimeError: an engine that held the reference does not decode as the policy does after the update.
    """
    engine, sampler = _megatron(work), _vllm(work, starts_from_reference=True)
    truth = work.truth().values["greedy_tokens"]
    versions = iter(range(1, 2**31))

    def step() -> Answer:
        sampler.update_weights(engine.export_weights(), version=next(versions))
        return Answer()

    if torch.equal(_decoded(sampler, work), truth):
        raise RuntimeError("reference and policy decode alike, so an update could not be told from none")
    step()
    if not torch.equal(_decoded(sampler, work), truth):
        raise RuntimeError("after a weight update the engine does not decode what the policy does")
    return step


def _megatron(work: WholeStep) -> MegatronEngine:
    return trainer(work, rows=batching(work, packed=False))


def _vllm(work: WholeStep, *, starts_from_reference: bool = False) -> VLLMEngine:
    return VLLMEngine(
        folder=work.reference if starts_from_reference else work.policy,
        world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), one_machine=True),
        settings=EngineSettings(
            tensor=1,
            dtype=torch.float32,
            max_model_len=max(map(len, work.prompts)) + work.tokens,
            max_num_seqs=len(work.prompts),
            kv_cache_bytes=_KV_CACHE_BYTES,
            timeout_s=_TIMEOUT_S,
            sleeps=False,
        ),
    )


def _decoded(engine: VLLMEngine, work: WholeStep) -> Tensor:
    """``[B, tokens]`` greedy token ids."""
    requests = [Request(prompt_ids=tuple(prompt), seed=number) for number, prompt in enumerate(work.prompts)]
    found = engine.generate(requests, Sampling(temperature=0.0, max_tokens=work.tokens, stop_ids=()))
    return torch.tensor([each.token_ids for each in found], dtype=torch.float64)
