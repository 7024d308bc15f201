"""PPO's clipped surrogate, with separate bounds and an optional third one."""

from torch import Tensor

from megatron_klrl.rl.surrogates.terms import SurrogateTerms, acting_bound, crossed, policy_log_ratios


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> SurrogateTerms:
    """The smaller of the plain and the clipped ratio's term.

    Value: with ``r = pi(y_t) / pi_old(y_t)``, ``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; with a dual clip
        ``max(that, dual_clip A)`` where ``A < 0``, which ends the growth of r there.
    **Gradient**: ``r A grad log pi(y_t)``, and none where clipped: ``r > 1 + clip_high`` with ``A > 0``; ``r < 1 -
        clip_low`` or ``r > dual_clip`` with ``A < 0``. On-policy (r = 1) it is REINFORCE's exactly. Off-policy, where
        nothing is clipped, it is the current policy's expectation over tokens, at the old policy's prefixes: no
        token-level ratio corrects those. Clipping leaves out the tokens that have moved furthest.
    Units: the advantage's.

    Args:
        logprobs: as in `Surrogate.terms`.
        old_logprobs: see there.
        advantages: see there.
        mask: see there.
        clip_low: largest distance of the ratio below 1 that still has a gradient.
        clip_high: largest distance above 1.
        dual_clip: largest ratio of a token with negative advantage that still has a gradient, above 1; None: no bound.

    Source: Schulman et al. 2017, arXiv 1707.06347; separate bounds Yu et al. 2025 (DAPO), arXiv 2503.14476; dual clip
        Ye et al. 2020, arXiv 1912.09729.
    """
    log_ratios = policy_log_ratios(logprobs, old_logprobs, mask)
    reached = log_ratios.detach().exp()
    clipped = crossed(reached, advantages, clip_low=clip_low, clip_high=clip_high)
    bound = acting_bound(advantages, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None:
        runaway = (advantages < 0) & (reached > dual_clip)
        clipped, bound = clipped | runaway, bound.where(~runaway, dual_clip)
    # a clipped ratio never enters the graph: an infinite one would turn its zero gradient into NaN
    ratios = log_ratios.where(~clipped, 0.0).exp()
    values = advantages * bound.where(clipped, ratios)
    return SurrogateTerms(values=values.where(mask, 0.0), clipped=clipped & mask)
