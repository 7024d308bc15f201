"""Weights from the trainer into the engines, and the proof that they arrived."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from megatron_klrl.config.recipe import Dtype, Fp8, Quantization, Recipe
from megatron_klrl.errors import DivergenceError, WorkError
from megatron_klrl.generation.engine import Completion, Memory, Request, Sampling
from megatron_klrl.generation.refit import RefitReport
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.rollout import Rollouts, collate, sample_everywhere
from megatron_klrl.runtime import seeds
from megatron_klrl.weight_sync.checksum import digest

BOUNDS: Mapping[Dtype, tuple[float, float]] = {Dtype.FP32: (1e-4, 2e-3), Dtype.BF16: (5e-2, 1.0)}
"""Largest mean and largest single |trainer - engine| log-probability, nats, between engines that hold the same weights.

They add the same numbers in another order. On the shipped model with its 4 layers that was measured as 6e-7 on average
and 9e-6 at most in float32, 5e-3 and 1e-1 in bfloat16 with its 8 bits of mantissa; deeper models add up more. Weights
that are wrong by a fifth differ by a tenth of a nat on average; a smaller error is the checksums' to find."""

_PROMPTS, _TOKENS = 16, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far trainer and engines are apart on the log-probabilities of the same tokens.

    Attributes:
        tokens: compared.
        mean: of the absolute differences, nats.
        largest: of them.
    """

    tokens: int
    mean: float
    largest: float

    def within(self, bounds: tuple[float, float]) -> bool:
        """Whether rounding explains it; not a number does not."""
        return self.mean <= bounds[0] and self.largest <= bounds[1]


def refit(parts: Parts, *, version: int, verify: bool) -> dict[str, float]:
    """Push the trainer's weights into the engines, which take their memory back for it if they had given it.

    Collective.

    Args:
        parts: of the run.
        version: of the weights.
        verify: prove that they arrived.

    Returns:
        What the verification measured; empty without one.

    Raises:
        WorkError: they did not arrive.
        DivergenceError: they arrived, and what is computed from them is not finite.
    """
    parts.engine.wake(Memory.WEIGHTS)
    report = parts.engine.update_weights(parts.trainer.export_weights(), version=version, verify=verify)
    parts.engine.wake(Memory.KV_CACHE)
    if not verify:
        return {}
    with parts.timers.span("verify"):
        wrong = difference(parts, report)
        if wrong:
            raise WorkError(f"weight update {version} did not arrive as it was sent: {wrong}")
        found = agreement(parts, sampled(parts, purpose="verify", version=version))
        if not math.isfinite(found.largest):
            raise DivergenceError(
                f"after weight update {version} log-probabilities are not finite, though its weights are: training has "
                "run away. Nothing of this step was saved; --resume with a smaller optimizer.lr"
            )
        bounds = BOUNDS[parts.recipe.precision.dtype]
        # of 8-bit products no bound has been measured; what they change is logged, and the checksums hold as ever
        rounded = parts.recipe.generation.quantization is Quantization.FP8 or parts.recipe.precision.fp8 is not Fp8.NONE
        if not rounded and not found.within(bounds):
            raise WorkError(
                f"after weight update {version} trainer and engine disagree on the log-probabilities of {found.tokens} "
                f"tokens by {found.mean:.1e} nats on average and {found.largest:.1e} at most, above {bounds[0]:g} and "
                f"{bounds[1]:g}: all tensors arrived, so the engine computes something else from them (klrl check sync)"
            )
    return {"mismatch/verified_abs_max": found.largest}


def restart(parts: Parts) -> None:
    """Give engines that served another run the weights that this one starts from, proven tensor by tensor; collective.

    No token is sampled for the proof: it would leave prompts in the engines' prefix caches that a fresh one has not.

    Raises:
        WorkError: they did not arrive.
    """
    parts.engine.wake(Memory.WEIGHTS)
    report = parts.engine.update_weights(parts.trainer.export_weights(), version=0, verify=True)
    parts.engine.wake(Memory.KV_CACHE)
    wrong = difference(parts, report)
    if wrong:
        raise WorkError(f"the engine kept something of the run before: {wrong}")


def due(recipe: Recipe, *, version: int, first: bool) -> bool:
    """Whether an update is one to verify; the first of a process always is."""
    every = recipe.generation.verify_every
    return first or (every > 0 and version % every == 0)


def difference(parts: Parts, report: RefitReport) -> str | None:
    """The first tensor whose bits are not the same in the trainers and the engines of all ranks, in words; collective.

    None if all are. The same on every rank.
    """
    sides = {"trainer": parts.trainer.weight_checksums(), "engine": dict(report.checksums or {})}
    digests = _gathered({side: digest(found) for side, found in sides.items()})
    wanted = digests[0]["trainer"]
    if all(digest == wanted for rank in digests for digest in rank.values()):
        return None
    everyone = _gathered(sides)
    reference: dict[str, str] = everyone[0]["trainer"]
    names = dict.fromkeys(name for rank in everyone for found in rank.values() for name in found)
    for name in names:
        for number, rank in enumerate(everyone):
            for side, found in rank.items():
                if found.get(name) != reference.get(name):
                    return f"{name} is another in the {side} of rank {number} than in the trainer of rank 0"
    raise AssertionError("digests differ only where a tensor does")


def sampled(parts: Parts, *, purpose: str, version: int) -> Rollouts:
    """A few short completions from the run's whole distribution, one for each of the first training prompts."""
    generation = parts.recipe.generation
    prompts = parts.task.prompts(0, _PROMPTS)
    requests = [
        Request(prompt_ids=prompt.token_ids, seed=seeds.derive(parts.recipe.loop.seed, purpose, version, prompt.index))
        for prompt in prompts
    ]
    sampling = Sampling(
        temperature=generation.temperature,
        max_tokens=max(1, min(_TOKENS, generation.max_tokens - 1)),
        stop_ids=parts.stop_ids,
    )
    completions: list[Completion] = sample_everywhere(
        parts.engine, requests, sampling, world=parts.world, engine_ranks=generation.tensor
    )
    return Rollouts(prompts=prompts, completions=completions, rewards=[0.0] * len(prompts))


def agreement(parts: Parts, found: Rollouts) -> Agreement:
    """Trainer against engine on the tokens of some rollouts, with the log-probabilities these carry; collective."""
    batch = collate(found, device=parts.world.device)
    gap = (parts.trainer.score(batch).old_logprobs - batch.rollout_logprobs)[batch.response_mask].abs()
    return Agreement(tokens=gap.numel(), mean=float(gap.mean()), largest=float(gap.max()))


def _gathered[T](mine: T) -> list[T]:
    found: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
