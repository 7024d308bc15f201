"""This project: one step of the trainer on completions that exist, Megatron engine included."""

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import BETA, CLIP, CLIP_GRAD, GROUP_SIZE, LEARNING_RATE, Replay
from megatron_klrl.batch import RolloutBatch
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.recipe import Recipe, Recompute
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.mcore import groups as process_groups
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.mcore.engine import MegatronEngine, TrainerSettings
from megatron_klrl.mcore.microbatches import Batching, Rows
from megatron_klrl.mcore.optimizer import OptimizerSettings
from megatron_klrl.mcore.streams import SyncSettings
from megatron_klrl.runtime.world import World

Step = Callable[[], Answer]


def replay(work: Replay, *, packed: bool) -> Step:
    """What loop/step.py does between rollouts and the next step: score, assemble, gradient, Adam.

    ``score`` also gives the entropy and the full-vocabulary KL of every token.
    """
    recipe, batch = replay_recipe(work), rollouts(work)
    engine = trainer(work, rows=batching(work, packed=packed))

    def step() -> Answer:
        scores = engine.score(batch)
        update = assemble(batch, scores, recipe, advantages=work.advantages)
        report = engine.forward_backward(update, policy_loss(recipe, update))
        grad_norm = engine.optim_step().grad_norm
        assert scores.ref_logprobs is not None  # the engine was built with a reference
        old, ref = (work.padded(each[batch.response_mask]) for each in (scores.old_logprobs, scores.ref_logprobs))
        return work.answer(torch.tensor(report.loss), old, ref, grad_norm=grad_norm)

    return step


def replay_recipe(work: Replay) -> Recipe:
    """beta is that of the benchmark over the longest length: ours weighs a sequence's KL, not its mean per token."""
    return Recipe.model_validate(
        {
            "model": {"path": str(work.policy)},
            "kl": {
                "beta": BETA / work.tokens, "estimator": "k3", "placement": "loss", "credit": "token",
                "allow_biased": True,
            },
            "algorithm": {
                "surrogate": "ppo_clip", "clip_low": CLIP, "clip_high": CLIP, "aggregation": "constant_norm",
            },
            "optimizer": {"lr": LEARNING_RATE},
            "generation": {"max_tokens": work.tokens},
            "loop": {"steps": 1, "prompts_per_step": len(work.prompts) // GROUP_SIZE, "group_size": GROUP_SIZE},
            "data": {"train": {"task": "arithmetic", "kind": "chain", "terms": [3, 4]}},
        }
    )  # fmt: skip


def rollouts(work: Replay) -> RolloutBatch:
    """The completions as the loop hands them over."""
    rows = [prompt + completion for prompt, completion in zip(work.prompts, work.completions, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    starts = torch.tensor([[len(prompt) - 1] for prompt in work.prompts])
    ends = torch.tensor([[len(row) - 1] for row in rows])
    positions = torch.arange(longest - 1)
    mask = (positions >= starts) & (positions < ends)
    count = len(rows)
    return RolloutBatch(
        tokens=tokens,
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        rewards=torch.zeros(count),
        truncated=torch.zeros(count, dtype=torch.bool),
        weight_version=torch.zeros(count, dtype=torch.long),
    )


def batching(work: Replay, *, packed: bool) -> Batching:
    """All rows in one microbatch."""
    count = sum(map(len, work.prompts)) + sum(map(len, work.completions))
    return Batching(
        rows=Rows.PACKED if packed else Rows.PADDED,
        size=count if packed else len(work.prompts),
        sequence_parallel=False,
    )


def trainer(work: Replay, *, rows: Batching) -> MegatronEngine:
    """As build.py makes it; the process group is the harness's."""
    run_on_cpu()
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), one_machine=True)
    groups = process_groups.initialize(world, process_groups.Layout(), seed=0)
    return MegatronEngine(
        world=world,
        groups=groups,
        shape=describe_model(str(work.policy)),
        folder=Path(work.policy),
        settings=TrainerSettings(
            dtype=torch.float32,
            batching=rows,
            temperature=1.0,
            head_chunk_tokens=None,
            recompute=Recompute.NONE,
            reference=work.reference,
            averages_reference=False,
            sync=SyncSettings(),
            optimizer=OptimizerSettings(
                lr=LEARNING_RATE,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.0,
                clip_grad=CLIP_GRAD,
                warmup_steps=0,
            ),
        ),
    )
