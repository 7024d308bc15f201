"""Which 8-bit formats which GPU has, and what they ask of a recipe; errors name the key to change."""

from collections.abc import Iterator, Mapping, Sequence

from megatron_klrl.config.algorithm import MismatchCorrection, RatioTo
from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Dtype, Fp8, Quantization, Recipe
from megatron_klrl.errors import UserError

Capability = tuple[int, int]
"""CUDA compute capability, major and minor."""

_ADA, _HOPPER, _BLACKWELL, _AFTER = (8, 9), (9, 0), (10, 0), (12, 0)
_RANGES: Mapping[Fp8, tuple[Capability, Capability | None]] = {
    Fp8.TENSORWISE: (_ADA, None),
    Fp8.DELAYED: (_ADA, None),
    Fp8.BLOCKWISE: (_HOPPER, _AFTER),
    Fp8.MXFP8: (_BLACKWELL, _AFTER),
}
"""From which capability, and up to which excluded. Transformer Engine 2.20 has the same bounds, but refuses only in the
first product of the first step; from 10.0 on it computes blockwise with mxfp8's products, which 12.0 does not have."""

_NO_PRIMARY_WEIGHTS = {
    Fp8.DELAYED: "a weight has no scale before the first update, and the reference never has one",
    Fp8.MXFP8: "the optimizer would have to gather exact weights through the gradients' memory",
}
"""Why a format is for products alone. Transformer Engine 2.20 starts delayed scaling at a scale of 1, where a weight of
0.02 is ten of the smallest steps; Megatron-Core 0.19 has no buffer of their own for mxfp8 weights."""

_ALIGNMENT = {Fp8.NONE: 1, Fp8.TENSORWISE: 16, Fp8.DELAYED: 16, Fp8.BLOCKWISE: 128, Fp8.MXFP8: 32}


def alignment(fp8: Fp8) -> int:
    """What the tokens of a microbatch on one rank, and the sizes of its matrices, must be multiples of.

    Transformer Engine 2.20 asks plain 8-bit products for 16 columns and 8 rows, Megatron-Core for 16 of both. A tensor
    that is no whole number of blocks, of 32 numbers in mxfp8 and of 128 in blockwise, is not quantised at all.
    """
    return _ALIGNMENT[fp8]


def available(capability: Capability) -> tuple[Fp8, ...]:
    """The formats that a GPU has."""
    return tuple(fp8 for fp8, (low, end) in _RANGES.items() if low <= capability and (end is None or capability < end))


def fp8_refusal(fp8: Fp8, capabilities: Sequence[Capability]) -> str | None:
    """Why the GPUs of a machine cannot take products in a format, in one sentence; None if they can.

    Args:
        fp8: the format.
        capabilities: of every GPU; empty on CPU.
    """
    if fp8 is Fp8.NONE:
        return None
    if not capabilities:
        return f"is {fp8}, but there is no GPU: 8-bit products need compute capability 8.9 or more"
    lowest = min(capabilities)
    if all(fp8 in available(capability) for capability in capabilities):
        return None
    has = ", ".join(available(lowest)) or "no 8-bit format"
    return f"is {fp8}, but a GPU of compute capability {lowest[0]}.{lowest[1]} has {has}"


def wants_capability(recipe: Recipe) -> bool:
    """Whether the GPUs must be asked."""
    return recipe.precision.fp8 is not Fp8.NONE or recipe.generation.quantization is not Quantization.NONE


def check_precision(recipe: Recipe, capabilities: Sequence[Capability]) -> None:
    """The GPUs have the formats that the recipe asks for.

    Raises:
        UserError: they do not, or there are none.
    """
    fp8, field = recipe.precision.fp8, "precision.fp8"
    refused = fp8_refusal(fp8, capabilities)
    if refused is not None:
        others = available(min(capabilities)) if capabilities else ()
        choices = " or ".join([f"{field}={name}" for name in ("none", *others)])
        raise UserError(refused, field=field, fix=f"set {choices}")
    quantised = recipe.generation.quantization is Quantization.FP8
    if quantised and (not capabilities or min(capabilities) < _ADA):
        what = "there is no GPU" if not capabilities else "the GPU has no 8-bit products"
        fix = "set generation.quantization=none"
        raise UserError(f"is fp8, but {what}", field="generation.quantization", fix=fix)


def check_fp8_settings(recipe: Recipe, shape: ModelShape) -> None:
    """8-bit products stand beside bf16, and the sizes of the model's matrices fit them."""
    precision = recipe.precision
    if precision.fp8 is Fp8.NONE:
        for name in ("first_last_bf16", "fp8_primary_weights"):
            if getattr(precision, name):
                fix = f"set precision.{name}=false, or precision.fp8"
                raise UserError("is true, but precision.fp8 is none", field=f"precision.{name}", fix=fix)
        return
    if precision.dtype is not Dtype.BF16:
        problem = f"is {precision.dtype}, but what 8-bit products do not take is bf16"
        raise UserError(problem, field="precision.dtype", fix="set precision.dtype=bf16")
    if precision.first_last_bf16 and precision.fp8 is Fp8.DELAYED:
        problem = "is true, but delayed scaling keeps its numbers for all layers together"
        fix = "set precision.first_last_bf16=false, or precision.fp8=tensorwise"
        raise UserError(problem, field="precision.first_last_bf16", fix=fix)
    if precision.fp8_primary_weights and precision.fp8 in _NO_PRIMARY_WEIGHTS:
        problem = f"is true, but with precision.fp8={precision.fp8} {_NO_PRIMARY_WEIGHTS[precision.fp8]}"
        fix = "set precision.fp8_primary_weights=false, or precision.fp8=tensorwise"
        raise UserError(problem, field="precision.fp8_primary_weights", fix=fix)
    _check_sizes(recipe, shape)


def _check_sizes(recipe: Recipe, shape: ModelShape) -> None:
    fp8, tensor = recipe.precision.fp8, recipe.parallel.tensor
    step = alignment(fp8)
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "hidden size": shape.hidden_size,
        "attention's rows of a rank": (query + 2 * key_value) // tensor,
        "attention's columns of a rank": query // tensor,
        "feed-forward columns of a rank": shape.ffn // (tensor if shape.experts is None else 1),
    }
    for what, size in sizes.items():
        if size % step:
            problem = f"is {fp8}, whose products need multiples of {step}, but the {what} are {size}"
            others = [other for other in _RANGES if size % alignment(other) == 0]
            fix = " or ".join(f"precision.fp8={other}" for other in (Fp8.NONE, *others))
            raise UserError(problem, field="precision.fp8", fix=f"set {fix}, or a smaller parallel.tensor")


def check_quantised_engine(recipe: Recipe) -> None:
    """Samples of a quantised model are not the policy's: they are corrected for, or the bias is taken knowingly."""
    corrected = (
        recipe.mismatch.correction is not MismatchCorrection.NONE or recipe.algorithm.ratio_to is RatioTo.ROLLOUT
    )
    if recipe.generation.quantization is Quantization.NONE or corrected or recipe.kl.allow_biased:
        return
    problem = "is fp8: rollouts come from the rounded model, not from the policy, and nothing corrects for it"
    fix = "set mismatch.correction=token_truncate, or kl.allow_biased=true to run it all the same"
    raise UserError(problem, field="generation.quantization", fix=fix)


def warn_precision(recipe: Recipe) -> Iterator[str]:
    """What works and may not be meant."""
    if recipe.precision.fp8 is Fp8.DELAYED:
        yield (
            "precision.fp8: delayed scaling takes its scales from earlier passes, so scoring and training round the "
            "same tokens differently; tensorwise does not"
        )
    if recipe.precision.fp8 is not Fp8.NONE and recipe.generation.quantization is Quantization.NONE:
        yield (
            "precision.fp8: the trainer rounds products to 8 bits and the engine does not; watch mismatch/kl, and see "
            "mismatch.correction"
        )
