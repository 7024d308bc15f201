"""Bytes of one rank in each phase of a step: what each part is, and how it was checked, docs/design/memory-plan.md."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_klrl.config.recipe import Quantization, Recipe, WeightTransport
from megatron_klrl.kl.axes import Estimator, Placement
from megatron_klrl.planning.activations import Modules, PerToken, Sizes, layer
from megatron_klrl.planning.layout import GPUS_OF_A_NODE, Layout
from megatron_klrl.planning.model import PlannedModel
from megatron_klrl.planning.work import Microbatch, Work, microbatch

FP32_BYTES = 4
_SCORE_WINDOW = 16  # microbatches per stage whose reference hidden states are alive: mcore/engine.py
_KERNEL_BUFFER_BYTES = {Modules.LOCAL: 5 << 19, Modules.FUSED: 1 << 26}  # of one buffer: vocab_parallel/eager.py


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """What is alive at the peak of a phase.

    Attributes:
        name: generate, score, train or sync.
        parts: bytes by what they are.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One rank, and what decides its memory.

    Attributes:
        model: of the run.
        recipe: of the run.
        layout: of the run.
        work: of a step.
        modules: what layers are built of.
        number: of the pipeline stage.
    """

    model: PlannedModel
    recipe: Recipe
    layout: Layout
    work: Work
    modules: Modules
    number: int = 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output layer."""
        return self.number == self.layout.pipeline - 1

    @property
    def columns(self) -> int:
        """Of the output layer on this rank, padding included."""
        return -(-self.model.vocab // self.layout.tensor)

    @property
    def dense(self) -> int:
        """Parameters on this rank outside of experts."""
        embedding = self.columns * self.model.hidden
        found = sum(
            count * self.model.dense_part(number, tensor=self.layout.tensor)
            for number, count in self.layout.kinds(self.model, self.number)
        )
        found += embedding if self.number == 0 else 0
        if self.is_last:  # a tied model's last stage holds the embedding again
            found += self.model.hidden
            found += embedding if self.layout.pipeline > 1 or not self.model.tied else 0
        return found

    @property
    def experts(self) -> int:
        """Parameters on this rank in experts."""
        kinds = self.layout.kinds(self.model, self.number)
        return sum(count * self.model.expert_part(number, expert=self.layout.expert) for number, count in kinds)

    @property
    def multiplied(self) -> int:
        """Parameters on this rank that are multiplied in 8 bits: of its layers, where norms are too small to count."""
        if not self.work.fp8:
            return 0
        numbers = [number for number, count in self.layout.kinds(self.model, self.number) for _ in range(count)]
        if self.recipe.precision.first_last_bf16:
            numbers = numbers[self.number == 0 : len(numbers) - self.is_last]
        return sum(
            self.model.dense_part(number, tensor=self.layout.tensor)
            + self.model.expert_part(number, expert=self.layout.expert)
            for number in numbers
        )

    def per_token(self) -> list[tuple[int, PerToken]]:
        """Of its layers: how many there are of a kind, and what one of them takes."""
        return [(count, self._layer(number)) for number, count in self.layout.kinds(self.model, self.number)]

    def _layer(self, number: int) -> PerToken:
        return layer(
            self.model,
            self.layout,
            number=number,
            modules=self.modules,
            number_bytes=self.work.number_bytes,
            fp8=self.work.fp8,
        )


def phases(stage: Stage) -> list[PhaseMemory]:
    """All four phases of a stage's rank."""
    recipe, always = stage.recipe, _always(stage)
    update = {"gradients": _gradients(stage), "optimizer": _optimizer(stage)}
    engine = {"engine weights": _engine_weights(stage)}
    cache = {"key-value cache": _cache(stage)}
    while_generating = {} if recipe.memory.offload_while_generating else update
    while_training = {} if recipe.generation.sleep else {**engine, **cache}
    part = microbatch(recipe, stage.work, stage.layout)
    return [
        PhaseMemory(name="generate", parts={**always, **while_generating, **engine, **cache}),
        PhaseMemory(name="score", parts={**always, **while_generating, **while_training, **_score(stage, part)}),
        PhaseMemory(name="train", parts={**always, **update, **while_training, **_train(stage, part)}),
        PhaseMemory(
            name="sync",
            # the cache comes back after the weights; what an update alone needs has gone before (loop/run.py)
            parts={
                **always,
                **while_generating,
                **engine,
                **({} if recipe.generation.sleep else cache),
                **_sync(stage),
            },
        ),
    ]


def _always(stage: Stage) -> dict[str, int]:
    """Weights, and those of the reference, which also has a float32 twin where it follows the policy in bf16.

    Weights in 8 bits lie along rows and along columns, the reference's, which has no backward, along rows alone.
    """
    numbers, width, small = stage.dense + stage.experts, stage.work.number_bytes, stage.multiplied
    plain = numbers - small if stage.recipe.precision.fp8_primary_weights else numbers
    found = {"weights": plain * width}
    if small:
        primary = stage.recipe.precision.fp8_primary_weights
        found["fp8 weights" if primary else "fp8 copies of weights"] = 2 * small
    if stage.work.has_reference:
        exact = stage.recipe.reference.ema is not None and width < FP32_BYTES
        found["reference"] = plain * width + small + (numbers * FP32_BYTES if exact else 0)
    return found | ({"buckets": _buckets(stage)} if _shares_memory(stage) else {})


def _shares_memory(stage: Stage) -> bool:
    """Whether the ranks open memory to each other for weights, and keep it: weight_sync/choose.py."""
    wanted = stage.recipe.weight_sync.transport
    if wanted is WeightTransport.AUTO:
        return stage.layout.replica > 1 and stage.layout.gpus <= GPUS_OF_A_NODE
    return wanted in (WeightTransport.SHARED_MEMORY, WeightTransport.CUDA_IPC)


def _buckets(stage: Stage) -> int:
    """Two, each of whole tensors: at most as large as the recipe says, at least as the largest tensor."""
    model, width = stage.model, stage.work.number_bytes
    largest = max(model.vocab * model.hidden * width, stage.recipe.weight_sync.bucket_mib << 20)
    return 2 * min(largest, model.parameters * width)


def _gradients(stage: Stage) -> int:
    return (stage.dense + stage.experts) * FP32_BYTES


def _optimizer(stage: Stage) -> int:
    """Adam's two moments, and float32 weights where the model's are not; each rank has its share."""
    each = 2 * FP32_BYTES + (FP32_BYTES if stage.work.number_bytes < FP32_BYTES else 0)
    return _shares(stage) * each


def _shares(stage: Stage) -> int:
    layout = stage.layout
    return -(-stage.dense // (layout.data * layout.context)) + -(-stage.experts // layout.expert_data)


def _engine_weights(stage: Stage) -> int:
    width = 1 if stage.recipe.generation.quantization is Quantization.FP8 else stage.work.number_bytes
    linear = stage.model.parameters - stage.model.vocab * stage.model.hidden * (1 if stage.model.tied else 2)
    rest = stage.model.parameters - linear
    return -(-(linear * width + rest * stage.work.number_bytes) // stage.layout.engine_tensor)


def cache_bytes_per_token(stage: Stage) -> int:
    """Of the engine's key-value cache on one rank."""
    return stage.model.cached_numbers(tensor=stage.layout.engine_tensor) * stage.work.number_bytes


def _cache(stage: Stage) -> int:
    """As much as the recipe sets; else what all sequences that are decoded at once can come to need."""
    given = stage.recipe.generation.kv_cache_mib
    if given is not None:
        return given << 20
    return concurrent(stage) * stage.work.longest * cache_bytes_per_token(stage)


def concurrent(stage: Stage) -> int:
    """Sequences that one engine decodes at the same time."""
    engines = stage.layout.gpus // stage.layout.engine_tensor
    return max(1, min(stage.recipe.generation.max_num_seqs, -(-stage.work.sequences // engines)))


# -- score ---------------------------------------------------------------------------------------------------------


def _score(stage: Stage, part: Microbatch) -> dict[str, int]:
    """One layer's forward, then the head; of the reference the hidden states of a window of microbatches."""
    local = part.tokens / stage.layout.context
    forward = max(one.forward for _, one in stage.per_token()) * local
    entry = 2 * Sizes.of(stage.model, stage.layout).hidden * stage.work.number_bytes * local
    found = {"activations": round(forward + entry)}
    if not stage.is_last:
        return found
    window = min(part.count, _SCORE_WINDOW * stage.layout.pipeline)
    hidden = part.responses / stage.layout.context * stage.model.hidden * stage.work.number_bytes
    found["reference's hidden states"] = round(window * hidden) if stage.work.has_reference else 0
    head = _logits(stage, part, compared=stage.work.has_reference) + round(hidden)
    # the head comes after the layers
    return {**found, "activations": round(entry), "logits": head} if head > forward else {**found, "logits": 0}


def _logits(stage: Stage, part: Microbatch, *, compared: bool) -> int:
    """Of a chunk, of the reference's beside them, and the float32 buffers of the passes over them."""
    tokens = _chunk(stage, part)
    one = tokens * stage.columns * stage.work.number_bytes
    buffer = min(tokens * stage.columns * FP32_BYTES, _KERNEL_BUFFER_BYTES[stage.modules])
    buffers = 4 if compared else 2
    if stage.work.number_bytes < FP32_BYTES:  # and the logits themselves in float32
        buffers += 2 if compared else 1
    return one * (2 if compared else 1) + buffer * buffers


def _chunk(stage: Stage, part: Microbatch) -> int:
    here = -(-part.responses // stage.layout.context)
    return min(here, stage.recipe.head.chunk_tokens or here)


# -- train ---------------------------------------------------------------------------------------------------------


def _train(stage: Stage, part: Microbatch) -> dict[str, int]:
    """The largest of: all activations and the head, a layer's backward, Adam's step."""
    local = part.tokens / stage.layout.context
    layers = stage.per_token()
    alive = in_flight(stage.layout, stage.number, part.count)
    kept = sum(count * one.kept for count, one in layers) / stage.layout.virtual * alive * local
    entry = Sizes.of(stage.model, stage.layout).hidden * stage.work.number_bytes * local
    backward = max(one.working for _, one in layers) * local
    head = _head(stage, part) if stage.is_last else {}
    step = _step(stage)
    activations = round(kept + entry)
    if sum(head.values()) >= backward and activations + sum(head.values()) >= step:
        return {"activations": activations, **head}
    if activations + backward >= step:
        return {"activations": activations, "layer's backward": round(backward)}
    return {"Adam's temporaries": step}


def in_flight(layout: Layout, stage: int, microbatches: int) -> int:
    """Chunks of microbatches of a stage whose activations are alive at once; a plain stage has one chunk."""
    if layout.virtual == 1:
        return min(layout.pipeline - stage, microbatches)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline
    return min(warm_up + 1, microbatches * layout.virtual)


def _head(stage: Stage, part: Microbatch) -> dict[str, int]:
    """Logits of a chunk and the gradients that the forward takes: of hidden states and of the output layer."""
    here = -(-part.responses // stage.layout.context)
    width, hidden = stage.work.number_bytes, stage.model.hidden
    kl = stage.recipe.kl
    exact = stage.work.has_reference and kl.estimator is Estimator.EXACT and kl.placement is not Placement.REWARD
    output = stage.columns * hidden
    chunks = -(-here // max(1, _chunk(stage, part)))
    wide = width < FP32_BYTES and chunks > 1
    gathered = part.tokens / stage.layout.context * hidden if stage.layout.sequence else 0
    return {
        "logits": _logits(stage, part, compared=exact),
        "head's hidden states": round((2 * here * hidden + gathered) * width),
        "gradient of the output layer": output * (width + FP32_BYTES if wide else width),
    }


def _step(stage: Stage) -> int:
    """Transformer Engine's Adam takes none; torch's, on CPU, two roots of the largest parameter's second moments."""
    if stage.modules is Modules.FUSED:
        return 0
    return 2 * stage.columns * stage.model.hidden * FP32_BYTES


# -- sync ----------------------------------------------------------------------------------------------------------


def _sync(stage: Stage) -> dict[str, int]:
    """Two buckets where tensors travel, and the largest layer that the engine takes apart and puts together again."""
    width, layout = stage.work.number_bytes, stage.layout
    model = stage.model
    largest = max(model.dense_part(number) + model.expert_part(number) for number in (0, model.layers - 1))
    found = {"engine's layer": -(-max(largest, model.vocab * model.hidden) // layout.engine_tensor) * width}
    moves = layout.replica > 1 and not _shares_memory(stage)
    return found | ({"buckets": _buckets(stage)} if moves else {})
