"""A recipe in words: its objective, its KL configuration and what that follows, its layout."""

from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.regularisation import BetaKind
from megatron_klrl.config.sampling import on_policy, truncation
from megatron_klrl.kl.refusal import refusal


def objective_text(recipe: Recipe) -> str:
    """Like ``max E[R] - 0.1 KL(policy || reference)``, with the level that the gradient must follow."""
    if recipe.kl.beta == 0:
        return "max E[R]"
    return f"max E[R] - {_beta_text(recipe)} KL(policy || {_reference_text(recipe)}), {recipe.kl.objective}-level, nats"


def _beta_text(recipe: Recipe) -> str:
    control = recipe.kl_control
    if control.kind is BetaKind.FIXED:
        return f"{recipe.kl.beta:g}"
    if control.kind is BetaKind.TARGET:
        return f"beta (from {recipe.kl.beta:g}, steered to a KL of {control.target:g} nats)"
    return f"beta (from {recipe.kl.beta:g} to {control.final:g} in {control.steps or recipe.loop.steps} steps)"


def _reference_text(recipe: Recipe) -> str:
    reference = recipe.reference
    name = "reference" if reference.path is None else reference.path
    if reference.reset_every:
        name += f", reset to the policy every {reference.reset_every} steps"
    return name if reference.ema is None else f"{name}, following the policy with decay {reference.ema:g}"


def kl_text(recipe: Recipe) -> str:
    """Like ``k1 in reward, credit to_go, beta 0.1``."""
    kl = recipe.kl
    if kl.beta == 0:
        return "off (beta 0)"
    correction = "" if kl.correction == "none" else f", correction {kl.correction}"
    correction += "" if kl.ratio_max is None else f" (ratio at most {kl.ratio_max:g})"
    return f"{kl.estimator} in {kl.placement}, credit {kl.credit}{correction}, beta {kl.beta:g}"


def kl_verdict(recipe: Recipe) -> str:
    """Whether the KL configuration follows its objective under this run's sampling, in one sentence."""
    if recipe.kl.beta == 0:
        reference = "the reference is only compared with" if recipe.has_reference else "no reference is loaded"
        return f"off: beta is 0, {reference}"
    fresh = on_policy(recipe.loop)
    refused = refusal(recipe.kl, on_policy=fresh)
    if refused is not None:
        return f"biased, and kl.allow_biased lets it run: {refused.reason}"
    truncated = truncation(recipe.generation)
    if truncated is not None:
        return f"biased, and kl.allow_biased lets it run: {truncated}"
    sampling = "on-policy" if fresh else "off-policy"
    return f"follows the gradient of the {recipe.kl.objective}-level KL {sampling}"


def layout_text(recipe: Recipe, *, world_size: int) -> str:
    """Like ``2 ranks (TP 2 x PP 1 x DP 1)``; what is rarely used is named where it is."""
    parallel = recipe.parallel
    plural = "s" if world_size > 1 else ""
    data = world_size // parallel.ranks_per_replica
    parts = [f"TP {parallel.tensor}", f"PP {parallel.pipeline}"]
    if parallel.virtual_pipeline > 1:
        parts[-1] += f" ({parallel.virtual_pipeline} chunks)"
    parts += [f"CP {parallel.context}"] if parallel.context > 1 else []
    parts += [f"DP {data}"] + ([f"EP {parallel.expert} inside"] if parallel.expert > 1 else [])
    return f"{world_size} rank{plural} ({' x '.join(parts)})"
