"""A recipe in words: its objective, its KL configuration and what that follows, its layout."""

from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.sampling import truncation
from megatron_klrl.kl.refusal import refusal


def objective_text(recipe: Recipe) -> str:
    """Like ``max E[R] - 0.1 KL(policy || reference)``, with the level that the gradient must follow."""
    if recipe.kl.beta == 0:
        return "max E[R]"
    return f"max E[R] - {recipe.kl.beta:g} KL(policy || reference), {recipe.kl.objective}-level, nats"


def kl_text(recipe: Recipe) -> str:
    """Like ``k1 in reward, credit to_go, beta 0.1``."""
    kl = recipe.kl
    if kl.beta == 0:
        return "off (beta 0)"
    correction = "" if kl.correction == "none" else f", correction {kl.correction}"
    return f"{kl.estimator} in {kl.placement}, credit {kl.credit}{correction}, beta {kl.beta:g}"


def kl_verdict(recipe: Recipe) -> str:
    """Whether the KL configuration follows its objective under this run's sampling, in one sentence."""
    if recipe.kl.beta == 0:
        return "off: beta is 0, no reference is loaded"
    refused = refusal(recipe.kl, on_policy=True)
    if refused is not None:
        return f"biased, and kl.allow_biased lets it run: {refused.reason}"
    truncated = truncation(recipe.generation)
    if truncated is not None:
        return f"biased, and kl.allow_biased lets it run: {truncated}"
    return f"follows the gradient of the {recipe.kl.objective}-level KL on-policy"


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
