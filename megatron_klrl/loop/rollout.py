"""From prompts to a rollout batch: every engine samples a share, every rank ends up with all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klrl.batch import RolloutBatch
from megatron_klrl.errors import WorkError
from megatron_klrl.generation.engine import Completion, GenerationEngine, Request, Sampling
from megatron_klrl.loop.parts import Parts
from megatron_klrl.runtime import seeds
from megatron_klrl.runtime.world import World
from megatron_klrl.tasks.task import Response, Task, Verdicts
from megatron_klrl.types import Prompt

_WIDTH_MULTIPLE = 8  # rows are padded to this, so that sequence parallelism can cut them and shapes repeat


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Prompts with their completions and rewards, siblings next to each other.

    Attributes:
        prompts: one for each completion.
        completions: of them.
        rewards: of the completions.
        verifier_timeouts: completions whose verification took too long.
        verifier_errors: completions on which the verifier failed.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    rewards: list[float]
    verifier_timeouts: int = 0
    verifier_errors: int = 0


def rollouts(
    parts: Parts,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    temperature: float,
    purpose: tuple[int | str, ...],
    top_p: float = 1.0,
    top_k: int | None = None,
) -> Rollouts:
    """Sample and verify ``samples`` completions of every prompt.

    Args:
        parts: of the run.
        task: verifies.
        prompts: in order.
        samples: completions of each prompt.
        temperature: 0 is greedy.
        purpose: names this use, so that its seeds are its own; for training it holds the step.
        top_p: as in ``Sampling``.
        top_k: as in ``Sampling``.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    requests = [
        Request(
            prompt_ids=prompt.token_ids,
            seed=seeds.derive(parts.recipe.loop.seed, *purpose, prompt.index, position % samples),
        )
        for position, prompt in enumerate(repeated)
    ]
    sampling = Sampling(
        temperature=temperature,
        max_tokens=parts.recipe.generation.max_tokens,
        stop_ids=parts.stop_ids,
        top_p=top_p,
        top_k=top_k,
    )
    completions = sample_everywhere(
        parts.engine, requests, sampling, world=parts.world, engine_ranks=parts.recipe.generation.tensor
    )
    responses = [Response(prompt, done.token_ids) for prompt, done in zip(repeated, completions, strict=True)]
    verdicts = verify_everywhere(task, responses, world=parts.world)
    return Rollouts(
        prompts=repeated,
        completions=completions,
        rewards=verdicts.rewards,
        verifier_timeouts=verdicts.timeouts,
        verifier_errors=verdicts.errors,
    )


def verify_everywhere(task: Task, responses: Sequence[Response], *, world: World) -> Verdicts:
    """Each rank verifies a contiguous share of the responses; every rank gets all verdicts, in order.

    Not only for speed: a verifier with a time limit may answer one rank and not the other, and ranks that disagree on a
    reward train different models.
    """
    if world.size == 1:
        return task.verify(responses)
    share = -(-len(responses) // world.size)
    mine = task.verify(responses[share * world.rank : share * (world.rank + 1)])
    padded = [*mine.rewards, *[0.0] * (share - len(mine.rewards))]
    counted = torch.tensor([*padded, mine.timeouts, mine.errors], dtype=torch.float64, device=world.device)
    found = _all_gather(counted).cpu()
    return Verdicts(
        rewards=found[:, :share].flatten()[: len(responses)].tolist(),
        timeouts=int(found[:, share].sum()),
        errors=int(found[:, share + 1].sum()),
    )


def sample_everywhere(
    engine: GenerationEngine, requests: Sequence[Request], sampling: Sampling, *, world: World, engine_ranks: int
) -> list[Completion]:
    """Each engine completes a contiguous share of the requests; every rank gets all completions, in order."""
    engines = world.size // engine_ranks
    share = -(-len(requests) // engines)
    start = share * (world.rank // engine_ranks)
    mine = engine.generate(requests[start : start + share], sampling)
    if engines == 1:
        return mine
    tokens, logprobs, facts = (
        _all_gather(t.to(world.device))[::engine_ranks].flatten(0, 1).cpu()
        for t in _to_tensors(mine, rows=share, width=sampling.max_tokens)
    )
    lengths = facts[:, 0].tolist()
    kept = range(len(requests))  # only the last share is shorter than `share`, so its blank rows come last
    return [
        Completion(
            token_ids=tuple(tokens[i, : lengths[i]].tolist()),
            logprobs=tuple(logprobs[i, : lengths[i]].tolist()),
            finish_reason="stop" if facts[i, 1] else "length",
            weight_version=int(facts[i, 2]),
        )
        for i in kept
    ]


def collate(found: Rollouts, *, device: torch.device) -> RolloutBatch:
    """Rollouts as padded tensors."""
    lengths = [(len(p.token_ids), len(c.token_ids)) for p, c in zip(found.prompts, found.completions, strict=True)]
    if any(response == 0 for _, response in lengths):
        raise WorkError("the engine returned an empty response: nothing can be learnt from it")
    rows, longest = len(lengths), max(p + r for p, r in lengths) - 1
    width = -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    tokens = torch.zeros(rows, width + 1, dtype=torch.long)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    logprobs = torch.zeros(rows, width)
    for row, (prompt, completion) in enumerate(zip(found.prompts, found.completions, strict=True)):
        before, response = lengths[row]
        tokens[row, : before + response] = torch.tensor(prompt.token_ids + completion.token_ids)
        mask[row, before - 1 : before - 1 + response] = True
        logprobs[row, before - 1 : before - 1 + response] = torch.tensor(completion.logprobs)
    versions = torch.tensor([completion.weight_version for completion in found.completions])
    return RolloutBatch(
        tokens=tokens.to(device),
        response_mask=mask.to(device),
        rollout_logprobs=logprobs.to(device),
        rewards=torch.tensor(found.rewards, dtype=torch.float32, device=device),
        truncated=torch.tensor([c.finish_reason == "length" for c in found.completions], device=device),
        weight_version=versions.to(device),
    )


def _to_tensors(completions: Sequence[Completion], *, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, logprobs = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.float32)
    facts = torch.zeros(rows, 3, dtype=torch.long)
    for row, completion in enumerate(completions):
        length = len(completion.token_ids)
        tokens[row, :length] = torch.tensor(completion.token_ids)
        logprobs[row, :length] = torch.tensor(completion.logprobs)
        facts[row] = torch.tensor([length, completion.finish_reason == "stop", completion.weight_version])
    return tokens, logprobs, facts


def _all_gather(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.stack(parts)
