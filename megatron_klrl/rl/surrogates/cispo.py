"""CISPO: the importance weight is clipped, the gradient is not."""

from torch import Tensor

from megatron_klrl.rl.surrogates.terms import SurrogateTerms, policy_log_ratios


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> SurrogateTerms:
    """REINFORCE with a clipped, detached importance weight.

    Value: with ``r = pi(y_t) / pi_old(y_t)``, ``sg[clip(r, 1 - clip_low, 1 + clip_high)] A_t log pi(y_t)``; its level
        means nothing.
    **Gradient**: ``clip(r) A_t grad log pi(y_t)``: a clipped token's is bounded, never removed. On-policy (r = 1) it is
        REINFORCE's exactly. Off-policy, where nothing is clipped, it is that of ``r A_t``: the current policy's
        expectation over tokens, at the old policy's prefixes. Clipping biases it towards the old policy's.
    Units: the advantage's, times nats.

    Args:
        logprobs: as in `Surrogate.terms`.
        old_logprobs: see there.
        advantages: see there.
        mask: see there.
        clip_low: distance of the weight's lower bound from 1; 1 is no bound.
        clip_high: distance of its upper bound from 1.

    Source: MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, equations 4 and 5; Khatri et al. 2025 (ScaleRL), arXiv
        2510.13786.
    """
    weights = policy_log_ratios(logprobs, old_logprobs, mask).detach().exp()
    low, high = 1 - clip_low, 1 + clip_high
    clipped = ((weights < low) | (weights > high)) & mask
    values = weights.clamp(low, high) * advantages * logprobs.where(mask, 0.0)
    return SurrogateTerms(values=values.where(mask, 0.0), clipped=clipped)
