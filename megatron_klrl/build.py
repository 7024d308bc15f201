"""Composition root: from a recipe to the parts of a run. The only module that names concrete engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_klrl.config.data import AnySource
from megatron_klrl.config.model_folder import ModelShape, describe_model, resolve_folder
from megatron_klrl.config.recipe import DEFAULT_MICRO_BATCH_SIZE, Dtype, Quantization, Recipe, WeightTransport
from megatron_klrl.config.regularisation import BetaKind
from megatron_klrl.errors import UserError
from megatron_klrl.generation.vllm_engine import EngineSettings, VLLMEngine
from megatron_klrl.kl.beta import BetaRule, Cosine, Fixed, Linear, Target
from megatron_klrl.loop.parts import EvalTask, Parts
from megatron_klrl.mcore import groups as process_groups
from megatron_klrl.mcore.checkpoint import load_model
from megatron_klrl.mcore.chunks import plain_chunks
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.mcore.engine import MegatronEngine, TrainerSettings
from megatron_klrl.mcore.microbatches import Batching, Rows, row_step
from megatron_klrl.mcore.model import unwrap
from megatron_klrl.mcore.optimizer import OptimizerSettings
from megatron_klrl.mcore.precision import Products
from megatron_klrl.mcore.streams import Streams, SyncSettings
from megatron_klrl.runtime import seeds
from megatron_klrl.runtime import world as ranks
from megatron_klrl.runtime.place import Places
from megatron_klrl.runtime.timers import Timers
from megatron_klrl.runtime.world import World
from megatron_klrl.tasks.sources import make_task
from megatron_klrl.tasks.task import Task
from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.weight_sync.choose import Kind

_DTYPES = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16}
_AFTER_THE_STEP_S = 60.0  # a hung collective is then found with the stacks of all ranks, not by its own timeout alone


@dataclass(frozen=True, kw_only=True)
class Site:
    """A joined rank, before any engine exists.

    Attributes:
        world: this rank's place.
        groups: Megatron's groups.
        shape: of the model.
        folder: the model's Hugging Face folder.
        tokenizer: of that folder.
    """

    world: World
    groups: process_groups.ProcessGroups
    shape: ModelShape
    folder: Path
    tokenizer: PreTrainedTokenizerBase


@contextmanager
def site(recipe: Recipe) -> Iterator[Site]:
    """Join the job, cut it into groups, and leave it in order at the end."""
    run_on_cpu()
    world = ranks.join(timeout_s=recipe.loop.step_timeout_s + _AFTER_THE_STEP_S)
    if world.device.type == "cpu":
        torch.set_num_threads(1)  # ranks share the cores; more threads spin against each other
    seeds.seed_everything(recipe.loop.seed)
    parallel = recipe.parallel
    layout = process_groups.Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        virtual=parallel.virtual_pipeline,
    )
    groups = process_groups.initialize(world, layout, seed=recipe.loop.seed)
    folder = resolve_folder(recipe.model.path)
    try:
        yield Site(
            world=world,
            groups=groups,
            shape=describe_model(recipe.model.path),
            folder=folder,
            tokenizer=_tokenizer(folder),
        )
    finally:
        process_groups.destroy()
        ranks.leave()


def reseed(recipe: Recipe) -> None:
    """Start every generator of this process anew, as a fresh rank of the recipe has them."""
    seeds.seed_everything(recipe.loop.seed)
    process_groups.seed_streams(recipe.loop.seed)


def build_trainer(recipe: Recipe, place: Site) -> MegatronEngine:
    """The Megatron engine of a recipe."""
    kernels.use(kernels.Kernels(recipe.head.kernels.value))
    optimizer = recipe.optimizer
    return MegatronEngine(
        world=place.world,
        groups=place.groups,
        shape=place.shape,
        folder=place.folder,
        settings=TrainerSettings(
            dtype=_DTYPES[recipe.precision.dtype],
            batching=_batching(recipe),
            temperature=recipe.generation.temperature,
            head_chunk_tokens=recipe.head.chunk_tokens,
            recompute=recipe.memory.recompute,
            reference=_reference_folder(recipe, place),
            averages_reference=recipe.reference.ema is not None,
            products=_products(recipe),
            sync=SyncSettings(
                kind=_transport(recipe.weight_sync.transport),
                bucket_bytes=recipe.weight_sync.bucket_mib << 20,
                folder=Path(recipe.weight_sync.folder) if recipe.weight_sync.folder else None,
            ),
            optimizer=OptimizerSettings(
                lr=optimizer.lr,
                betas=optimizer.adam_betas,
                eps=optimizer.adam_eps,
                weight_decay=optimizer.weight_decay,
                clip_grad=optimizer.clip_grad,
                warmup_steps=optimizer.warmup_steps,
            ),
        ),
    )


def _reference_folder(recipe: Recipe, place: Site) -> Path | None:
    if not recipe.has_reference:
        return None
    return place.folder if recipe.reference.path is None else resolve_folder(recipe.reference.path)


def _beta_rule(recipe: Recipe) -> BetaRule:
    control, start = recipe.kl_control, recipe.kl.beta
    steps = control.steps or recipe.loop.steps
    if control.kind is BetaKind.TARGET:
        return Target(
            start=start,
            target=_given(control.target, "target"),
            gain=control.gain,
            clip=control.clip,
            low=control.low,
            high=control.high,
        )
    if control.kind is BetaKind.FIXED:
        return Fixed(value=start)
    kind = Linear if control.kind is BetaKind.LINEAR else Cosine
    return kind(start=start, final=_given(control.final, "final"), steps=steps)


def _given(value: float | None, name: str) -> float:
    if value is None:
        raise ValueError(f"kl_control.{name} is missing: config/loop_rules.py refuses such a recipe")
    return value


def _transport(wanted: WeightTransport) -> Kind | None:
    return None if wanted is WeightTransport.AUTO else Kind(wanted.value)


def _batching(recipe: Recipe) -> Batching:
    packed = recipe.loop.tokens_per_microbatch is not None
    return Batching(
        rows=Rows.PACKED if packed else Rows.PADDED,
        size=recipe.loop.tokens_per_microbatch or recipe.loop.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE,
        sequence_parallel=recipe.parallel.sequence,
        token_multiple=_products(recipe).token_multiple,
    )


def _products(recipe: Recipe) -> Products:
    precision = recipe.precision
    return Products(
        fp8=precision.fp8, first_last_bf16=precision.first_last_bf16, primary_weights=precision.fp8_primary_weights
    )


def build_engine(recipe: Recipe, place: Site, *, folder: Path | None = None) -> VLLMEngine:
    """The generation engine of a recipe, with the weights of ``folder`` (default: the recipe's model)."""
    settings = recipe.generation
    return VLLMEngine(
        folder=folder or place.folder,
        world=place.world,
        settings=EngineSettings(
            tensor=settings.tensor,
            dtype=_DTYPES[recipe.precision.dtype],
            max_model_len=settings.max_model_len or place.shape.max_position_embeddings,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_bytes=settings.kv_cache_mib * 2**20 if settings.kv_cache_mib else None,
            timeout_s=settings.timeout_s,
            sleeps=settings.sleep,
            quantised=settings.quantization is Quantization.FP8,
        ),
    )


def build_parts(recipe: Recipe, place: Site, *, trainer: Any, engine: Any, places: Places | None = None) -> Parts:
    """All parts of a run around its two engines."""
    return Parts(
        recipe=recipe,
        world=place.world,
        trainer=trainer,
        engine=engine,
        beta_rule=_beta_rule(recipe),
        task=_task(
            recipe, place, recipe.data.train, "data.train", seed=seeds.derive(recipe.loop.seed, "prompts"), shuffle=True
        ),
        evaluation={
            name: EvalTask(
                task=_task(
                    recipe,
                    place,
                    spec,
                    f"data.eval.{name}",
                    seed=seeds.derive(recipe.loop.seed, "eval", name),
                    shuffle=False,
                ),
                prompts=spec.prompts,
                samples=spec.samples,
                temperature=spec.temperature,
            )
            for name, spec in recipe.data.eval.items()
        },
        stop_ids=place.shape.eos_ids,
        timers=Timers(places),
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"{folder} holds no tokenizer that transformers can load",
            field="model.path",
            fix="save one there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    return tokenizer


def _task(recipe: Recipe, place: Site, source: AnySource, field: str, *, seed: int, shuffle: bool) -> Task:
    positions = recipe.generation.max_model_len or place.shape.max_position_embeddings
    if source is recipe.data.train and recipe.loop.tokens_per_microbatch is not None:
        step = row_step(place.groups, sequence_parallel=False)
        positions = min(positions, recipe.loop.tokens_per_microbatch // step * step)  # a sequence fits into one pack
    return make_task(
        source,
        field=field,
        tokenizer=place.tokenizer,
        verifier=recipe.data.verifier,
        seed=seed,
        shuffle=shuffle,
        room=positions - recipe.generation.max_tokens,
    )


def checkpoint_weights(recipe: Recipe, place: Site, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The policy of a checkpoint under Hugging Face names; collective."""
    chunks = plain_chunks(
        place.shape, place.folder, groups=place.groups, dtype=_DTYPES[recipe.precision.dtype], device=place.world.device
    )
    load_model(checkpoint, chunks, groups=place.groups)
    bare = [unwrap(chunk) for chunk in chunks]
    return Streams(bare, shape=place.shape, groups=place.groups, world=place.world, settings=SyncSettings()).weights()
