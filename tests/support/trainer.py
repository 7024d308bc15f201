"""A Megatron engine in a test's rank, and a batch to train it on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_klrl.batch import RolloutBatch, TrainBatch
from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.losses.policy_loss import PolicyLoss
from megatron_klrl.mcore import groups as process_groups
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.mcore.engine import MegatronEngine, TrainerSettings
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.microbatches import Batching, Rows
from megatron_klrl.mcore.optimizer import OptimizerSettings
from megatron_klrl.mcore.precision import Products
from megatron_klrl.mcore.streams import SyncSettings
from megatron_klrl.rl.aggregation import sequence_sum
from megatron_klrl.runtime import seeds
from megatron_klrl.runtime import world as ranks

ADAM = OptimizerSettings(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, clip_grad=1.0, warmup_steps=0)


@contextmanager
def trainer(folder: Path, **options: Any) -> Iterator[MegatronEngine]:
    """An engine over the ranks that run this function; ``options`` are those of ``trainer_in``."""
    run_on_cpu()
    world = ranks.join(timeout_s=60)
    try:
        with trainer_in(world, folder, **options) as engine:
            yield engine
    finally:
        ranks.leave()


@contextmanager
def trainer_in(
    world: ranks.World,
    folder: Path,
    *,
    sequence: bool = False,
    micro_batch_size: int = 2,
    tokens_per_microbatch: int | None = None,
    head_chunk_tokens: int | None = 7,
    recompute: Recompute = Recompute.NONE,
    with_reference: bool = True,
    averages_reference: bool = False,
    dtype: torch.dtype = torch.float32,
    sync: SyncSettings | None = None,
    layers: Layers | None = None,
    products: Products | None = None,
    **layout: int,
) -> Iterator[MegatronEngine]:
    """An engine in a world that has been joined, after ``run_on_cpu``, and that outlives it."""
    torch.set_num_threads(1)
    seeds.seed_everything(0)
    groups = process_groups.initialize(world, process_groups.Layout(**layout), seed=0)
    try:
        yield MegatronEngine(
            world=world,
            groups=groups,
            shape=describe_model(folder),
            folder=folder,
            settings=TrainerSettings(
                dtype=dtype,
                batching=Batching(
                    rows=Rows.PADDED if tokens_per_microbatch is None else Rows.PACKED,
                    size=tokens_per_microbatch or micro_batch_size,
                    sequence_parallel=sequence,
                    token_multiple=(products or Products()).token_multiple,
                ),
                temperature=1.0,
                head_chunk_tokens=head_chunk_tokens,
                recompute=recompute,
                reference=folder if with_reference else None,
                averages_reference=averages_reference,
                optimizer=ADAM,
                sync=sync or SyncSettings(),
                layers=layers,
                products=products or Products(),
            ),
        )
    finally:
        process_groups.destroy()


def rollout_batch(*, rows: int = 6, width: int = 16, vocab_size: int = 50, seed: int = 3) -> RolloutBatch:
    """Random sequences with ragged prompts and responses."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocab_size, (rows, width + 1), generator=generator)
    start = torch.randint(2, 5, (rows, 1), generator=generator)
    end = torch.randint(8, width + 1, (rows, 1), generator=generator)
    position = torch.arange(width)
    return RolloutBatch(
        tokens=tokens,
        response_mask=(position >= start) & (position < end),
        rollout_logprobs=-3 * torch.rand(rows, width, generator=generator),
        rewards=torch.rand(rows, generator=generator),
        truncated=torch.zeros(rows, dtype=torch.bool),
        weight_version=torch.zeros(rows, dtype=torch.long),
    )


def train_batch(batch: RolloutBatch, *, seed: int = 4) -> TrainBatch:
    """Random advantages for the reward and for the KL."""
    generator = torch.Generator().manual_seed(seed)
    size = batch.response_mask.shape
    return TrainBatch(
        tokens=batch.tokens,
        response_mask=batch.response_mask,
        advantages=torch.randn(size, generator=generator),
        token_weights=sequence_sum(batch.response_mask),
        old_logprobs=batch.rollout_logprobs,
        importance_weights=torch.ones(size),
        kl_advantages=torch.randn(size, generator=generator),
        ref_logprobs=None,
        rollout_logprobs=batch.rollout_logprobs,
    )


def policy_loss(batch: RolloutBatch) -> PolicyLoss:
    """The loss of such a batch."""
    return PolicyLoss(num_sequences=batch.tokens.shape[0], num_tokens=int(batch.response_mask.sum()))
