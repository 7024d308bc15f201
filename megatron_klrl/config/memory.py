"""Estimate of the memory one rank needs, from the model's shape alone. Activations are not in it."""

from dataclasses import dataclass

from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Dtype, Recipe

_BYTES = {Dtype.FP32: 4, Dtype.BF16: 2}
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes per rank, each part as if nothing were freed or moved in between.

    Attributes:
        parameters: of the whole model.
        weights_bytes: the trained weights of this rank.
        gradients_bytes: fp32 gradients.
        optimizer_bytes: two fp32 moments, and fp32 master weights unless the weights are fp32 already.
        reference_bytes: frozen reference weights; 0 if beta is 0.
        engine_weights_bytes: the generation engine's own copy.
        engine_cache_bytes: its key-value cache; None if the engine decides.
    """

    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    engine_weights_bytes: int
    engine_cache_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Sum of the parts that are known."""
        trainer = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reference_bytes
        return trainer + self.engine_weights_bytes + (self.engine_cache_bytes or 0)


def estimate_memory(recipe: Recipe, shape: ModelShape) -> MemoryEstimate:
    """Bytes of one rank: parameters spread evenly over tensor (expert) and pipeline ranks, Adam not over data ranks."""
    parallel = recipe.parallel
    local = -(-(shape.parameters - shape.expert_parameters) // (parallel.tensor * parallel.pipeline))
    local += -(-shape.expert_parameters // (parallel.expert * parallel.pipeline))
    width = _BYTES[recipe.precision.dtype]
    master = 0 if recipe.precision.dtype is Dtype.FP32 else _FP32_BYTES
    cache = recipe.generation.kv_cache_mib
    return MemoryEstimate(
        parameters=shape.parameters,
        weights_bytes=local * width,
        gradients_bytes=local * _FP32_BYTES,
        optimizer_bytes=local * (2 * _FP32_BYTES + master),
        reference_bytes=local * width if recipe.has_reference else 0,
        engine_weights_bytes=-(-shape.parameters // recipe.generation.tensor) * width,
        engine_cache_bytes=None if cache is None else cache * 2**20,
    )
