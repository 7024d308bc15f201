"""Ways to spread a model over GPUs: which are possible, and what a rank of one holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_klrl.config.recipe import Recipe, Recompute
from megatron_klrl.errors import UserError
from megatron_klrl.planning.model import PlannedModel

GPUS_OF_A_NODE = 8  # tensor parallelism over more is possible, and never quick
_MOST_CONTEXT = 8
_LARGEST_ENGINE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How trainer and engine are spread; data parallelism is what is left.

    Attributes:
        gpus: of the job.
        tensor: ranks of each weight matrix.
        pipeline: stages.
        virtual: chunks of a stage.
        context: ranks of each sequence.
        expert: ranks of the experts of a layer.
        sequence: activations are cut along the sequence inside a tensor group.
        recompute: activations computed again.
        engine_tensor: ranks of one generation engine.
    """

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    recompute: Recompute = Recompute.NONE
    engine_tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that hold the same shard and different rows."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def replica(self) -> int:
        """Ranks over which one copy of the weights is spread."""
        return self.tensor * self.pipeline * self.expert

    def kinds(self, model: PlannedModel, stage: int) -> list[tuple[int, int]]:
        """Layers of a stage that are alike: number of one of them, and how many. Its chunks take layers in turn."""
        size = model.layers // (self.pipeline * self.virtual)
        starts = [(chunk * self.pipeline + stage) * size for chunk in range(self.virtual)]
        first = model.mixture.dense_layers if model.mixture is not None else model.layers
        dense = sum(min(max(first - start, 0), size) for start in starts)
        kinds = [(0, dense), (model.layers - 1, size * self.virtual - dense)]
        return [(number, count) for number, count in kinds if count]

    def text(self) -> str:
        """Like ``TP 2 x PP 4 x DP 8, EP 16, sequence, recompute full, engine TP 2``."""
        parts = [f"TP {self.tensor}", f"PP {self.pipeline}"]
        parts[-1] += f" ({self.virtual} chunks)" if self.virtual > 1 else ""
        parts += [f"CP {self.context}"] if self.context > 1 else []
        parts += [f"DP {self.data}"]
        rest = [f"EP {self.expert}"] if self.expert > 1 else []
        rest += ["sequence"] if self.sequence else []
        rest += [] if self.recompute is Recompute.NONE else [f"recompute {self.recompute}"]
        return ", ".join([" x ".join(parts), *rest, f"engine TP {self.engine_tensor}"])


def of_recipe(recipe: Recipe, *, gpus: int) -> Layout:
    """The layout that a recipe asks for."""
    parallel = recipe.parallel
    return Layout(
        gpus=gpus,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        sequence=parallel.sequence,
        recompute=recipe.memory.recompute,
        engine_tensor=recipe.generation.tensor,
    )


def problem(layout: Layout, model: PlannedModel) -> UserError | None:
    """Why a layout is not possible; None if it is. The rules are those that a run is checked by."""
    heads = {"attention heads": model.heads, "key-value heads": model.kv_heads}
    wide = {"feed-forward columns": model.ffn} if model.ffn else {}
    experts = model.mixture.count if model.mixture is not None else 1
    copy, stage = layout.tensor * layout.pipeline * layout.context, layout.gpus // layout.pipeline
    checks = [
        ("parallel.tensor", layout.tensor, {**heads, **wide}),
        ("parallel.pipeline", layout.pipeline, {"layers": model.layers}),
        ("parallel.virtual_pipeline", layout.virtual, {"layers of a stage": model.layers // layout.pipeline}),
        ("parallel.expert", layout.expert, {"experts": experts, "GPUs of a pipeline stage": stage}),
        ("generation.tensor", layout.engine_tensor, {"attention heads": model.heads, "GPUs": layout.gpus}),
        ("parallel", copy, {"GPUs (tensor x pipeline x context)": layout.gpus}),
    ]
    for field, parts, sizes in checks:
        for what, size in sizes.items():
            if size % parts:
                return UserError(f"{parts} does not divide {size} {what}", field=field, fix="choose a divisor")
    if layout.virtual > 1 and layout.pipeline == 1:
        fix = "set parallel.virtual_pipeline=1, or parallel.pipeline to 2 or more"
        return UserError("needs a pipeline to interleave", field="parallel.virtual_pipeline", fix=fix)
    if layout.sequence and layout.tensor == 1:
        fix = "set parallel.sequence=false, or parallel.tensor to 2 or more"
        return UserError("needs a tensor group to split over", field="parallel.sequence", fix=fix)
    if model.mixture is not None and layout.tensor > 1 and not layout.sequence:
        return UserError("is needed by experts with TP", field="parallel.sequence", fix="set parallel.sequence=true")
    return None


def candidates(model: PlannedModel, *, gpus: int) -> Iterator[Layout]:
    """Every possible layout: tensor parallelism inside a node, sequence parallelism wherever there is tensor's."""
    experts = _divisors(model.mixture.count) if model.mixture is not None else [1]
    for tensor in _divisors(gpus, most=GPUS_OF_A_NODE):
        for pipeline in _divisors(model.layers, most=gpus // tensor):
            for context in _divisors(gpus, most=_MOST_CONTEXT):
                for expert in experts:
                    trainer = Layout(
                        gpus=gpus,
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        expert=expert,
                        sequence=tensor > 1,
                    )
                    if problem(trainer, model) is None:
                        yield from _variants(trainer, model)


def _variants(trainer: Layout, model: PlannedModel) -> Iterator[Layout]:
    for recompute in Recompute:
        for engine in _divisors(trainer.gpus, most=_LARGEST_ENGINE):
            layout = replace(trainer, recompute=recompute, engine_tensor=engine)
            if problem(layout, model) is None:
                yield layout


def _divisors(number: int, *, most: int | None = None) -> list[int]:
    return [part for part in range(1, min(number, most or number) + 1) if number % part == 0]
