"""Bytes that the layers of a stage keep for the backward, for each token of a microbatch.

Two lists, because the modules differ: Megatron's local ones on CPU, each operation on its own, and Transformer
Engine's fused ones on CUDA. The first is held to measurements in tests; of the second nothing has been measured.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_klrl.config.recipe import Recompute
from megatron_klrl.planning.layout import Layout
from megatron_klrl.planning.model import PlannedModel


class Modules(StrEnum):
    """What layers are built of."""

    LOCAL = "local"
    FUSED = "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerToken:
    """Bytes for one token.

    Attributes:
        kept: from forward to backward.
        working: beside it while the layer's backward runs.
        forward: beside the layer's input while a forward without gradient runs.
    """

    kept: float
    working: float
    forward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers for one token on one rank.

    Attributes:
        hidden: of the residual stream, cut where sequence parallelism cuts it.
        whole: of the residual stream, whole.
        query: of all local heads' queries.
        key: of all local heads' keys.
        value: of all local heads' values.
        out: of what attention returns.
        heads: local query heads.
    """

    hidden: float
    whole: float
    query: float
    key: float
    value: float
    out: float
    heads: float

    @classmethod
    def of(cls, model: PlannedModel, layout: Layout) -> "Sizes":
        """Of a model in a layout."""
        tensor = layout.tensor
        value = model.latent.value if model.latent is not None else model.head_dim
        return cls(
            hidden=model.hidden / (tensor if layout.sequence else 1),
            whole=model.hidden,
            query=model.heads * model.head_dim / tensor,
            key=model.kv_heads * model.head_dim / tensor,
            value=model.kv_heads * value / tensor,
            out=model.heads * value / tensor,
            heads=model.heads / tensor,
        )


def layer(
    model: PlannedModel, layout: Layout, *, number: int, modules: Modules, number_bytes: int, fp8: bool
) -> PerToken:
    """Of one layer.

    Args:
        model: of the run.
        layout: of the run.
        number: of the layer, from 0.
        modules: what layers are built of.
        number_bytes: of an activation.
        fp8: products take 8-bit copies, which are what is kept.
    """
    sizes = Sizes.of(model, layout)
    product_bytes = 1 if fp8 else number_bytes
    attention, core = _attention(model, sizes, modules, number_bytes, product_bytes)
    feed_forward = _feed_forward(model, layout, sizes, number, modules, number_bytes, product_bytes)
    whole = attention + core + feed_forward
    working = _working(model, layout, sizes, number) * number_bytes
    entry = sizes.hidden * number_bytes
    if layout.recompute is Recompute.FULL:
        return PerToken(kept=entry, working=whole + working, forward=working)
    if layout.recompute is Recompute.ATTENTION:
        return PerToken(kept=whole - core, working=core + working, forward=working)
    return PerToken(kept=whole, working=working, forward=working)


def _attention(
    model: PlannedModel, sizes: Sizes, modules: Modules, number_bytes: int, product_bytes: int
) -> tuple[float, float]:
    """Kept by norm, projections and residual; and by the core attention alone, which can be computed again."""
    row = sizes.query + sizes.key + sizes.value
    statistics = 4 * sizes.heads
    compressed = 0.0
    if model.latent is not None:
        compressed = 2 * (model.latent.query_rank + model.latent.key_value_rank + model.latent.rope)
    if modules is Modules.FUSED:
        norm = sizes.hidden * number_bytes + sizes.hidden * product_bytes
        norms_of_heads = (sizes.query + sizes.key) * number_bytes if model.qk_norm else 0
        around = norm + norms_of_heads + (row + compressed) * number_bytes + sizes.out * product_bytes
        return around, sizes.out * number_bytes + statistics
    norm = 3 * sizes.hidden
    # the projection's output, of which values and the input of the head norms are views; a copy of the queries
    projected = row + sizes.query
    rotated = sizes.query + sizes.key
    normed = 2 * (sizes.query + sizes.key) if model.qk_norm else 0
    around = (norm + projected + rotated + normed + compressed + sizes.out) * number_bytes
    return around, sizes.out * number_bytes + statistics


def _feed_forward(
    model: PlannedModel,
    layout: Layout,
    sizes: Sizes,
    number: int,
    modules: Modules,
    number_bytes: int,
    product_bytes: int,
) -> float:
    fused = modules is Modules.FUSED
    norm = sizes.hidden * number_bytes + sizes.hidden * (product_bytes if fused else 2 * number_bytes)
    if model.mixture is None or not model.has_experts(number):
        return norm + _gated(
            model.ffn / layout.tensor, fused=fused, number_bytes=number_bytes, product_bytes=product_bytes
        )
    mixture = model.mixture
    # tokens that arrive, if all experts are asked for equally often; sequence parallelism cuts them first
    share = layout.tensor if layout.sequence else 1
    routed = mixture.per_token / share
    arrived = routed * model.hidden * (product_bytes + number_bytes * (1 if fused else 2))
    experts = routed * _gated(mixture.ffn, fused=fused, number_bytes=number_bytes, product_bytes=product_bytes)
    shared = _gated(
        mixture.shared_ffn / layout.tensor, fused=fused, number_bytes=number_bytes, product_bytes=product_bytes
    )
    routing = 4 * 3 * mixture.count / share
    return norm + arrived + experts + shared + routing


def _gated(width: float, *, fused: bool, number_bytes: int, product_bytes: int) -> float:
    """Gate and up as they come, what the activation makes of the gate (when not fused), and the product."""
    return width * ((2 if fused else 3) * number_bytes + product_bytes)


def _working(model: PlannedModel, layout: Layout, sizes: Sizes, number: int) -> float:
    """Numbers alive at the widest place of a layer beside what is kept: the gradients around the gated block."""
    if model.mixture is not None and model.has_experts(number):
        share = layout.tensor if layout.sequence else 1
        return model.mixture.per_token / share * 2 * model.hidden + sizes.whole
    return 4 * model.ffn / layout.tensor + sizes.whole
