"""This project: one step of the trainer on completions that exist, Megatron engine included."""

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import BETA, CLIP, CLIP_GRAD, GROUP_SIZE, LEARNING_RATE, Replay
from megatron_klrl.batch import RolloutBatch
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.recipe import Fp8, Recipe, Recompute
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.mcore import groups as process_groups
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.mcore.engine import MegatronEngine, TrainerSettings
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.microbatches import Batching, Rows
from megatron_klrl.mcore.optimizer import OptimizerSettings
from megatron_klrl.mcore.precision import Products
from megatron_klrl.mcore.streams import SyncSettings
from megatron_klrl.runtime.world import World

Step = Callable[[], Answer]


def replay(work: Replay, *, packed: bool, layers: str | None = None, fp8: str = "none") -> Step:
    """What loop/step.py does between rollouts and the next step: score, assemble, gradient, Adam.

    ``score`` also gives the entropy and the full-vocabulary KL of every token.

    Args:
        work: the rows.
        packed: one after the other instead of padded.
        layers: ``local`` or ``fused`` (Transformer Engine's); None takes what the device runs quickest.
        fp8: scaling of 8-bit products.
    """
    recipe, batch = replay_recipe(work), rollouts(work)
    products = Products(fp8=Fp8(fp8))
    rows = batching(work, packed=packed, multiple=products.token_multiple)
    engine = trainer(work, rows=rows, layers=layers, products=products)
    advantages = work.advantages.to(work.device)

    def step() -> Answer:
        scores = engine.score(batch)
        update = assemble(batch, scores, recipe, advantages=advantages)
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
        tokens=tokens.to(work.device),
        response_mask=mask.to(work.device),
        rollout_logprobs=torch.zeros(mask.shape, device=work.device),
        rewards=torch.zeros(count, device=work.device),
        truncated=torch.zeros(count, dtype=torch.bool, device=work.device),
        weight_version=torch.zeros(count, dtype=torch.long, device=work.device),
    )


def batching(work: Replay, *, packed: bool, multiple: int = 1) -> Batching:
    """Rows in microbatches of the workload's size; packed, as many tokens as those have on average."""
    count = sum(map(len, work.prompts)) + sum(map(len, work.completions))
    of_a_pass = -(-count * work.micro_batch_size // len(work.prompts))
    longest = max(len(prompt) + len(row) for prompt, row in zip(work.prompts, work.completions, strict=True))
    return Batching(
        rows=Rows.PACKED if packed else Rows.PADDED,
        size=max(of_a_pass, longest) if packed else work.micro_batch_size,
        sequence_parallel=False,
        token_multiple=multiple,
    )


def trainer(
    work: Replay, *, rows: Batching, layers: str | None = None, products: Products | None = None
) -> MegatronEngine:
    """As build.py makes it; the process group is the harness's."""
    run_on_cpu()
    world = World(rank=0, size=1, local_rank=0, device=work.device, one_machine=True)
    groups = process_groups.initialize(world, process_groups.Layout(), seed=0)
    return MegatronEngine(
        world=world,
        groups=groups,
        shape=describe_model(str(work.policy)),
        folder=Path(work.policy),
        settings=TrainerSettings(
            dtype=work.dtype,
            batching=rows,
            temperature=1.0,
            head_chunk_tokens=None if work.device.type == "cpu" else 1024,
            recompute=Recompute.NONE,
            reference=work.reference,
            averages_reference=False,
            sync=SyncSettings(),
            layers=None if layers is None else Layers(layers),
            products=products or Products(),
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
