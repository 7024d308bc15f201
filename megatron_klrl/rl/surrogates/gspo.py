"""Group Sequence Policy Optimization: one ratio, and one clip, for a whole sequence."""

from torch import Tensor

from megatron_klrl.rl.surrogates.terms import SurrogateTerms, acting_bound, crossed, policy_log_ratios


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> SurrogateTerms:
    """Each token with the length-normalised ratio of its sequence, clipped as one.

    Value: with ``s = (pi(y) / pi_old(y)) ** (1 / |y|)``, at every token ``min(s A, clip(s, 1 - clip_low, 1 + clip_high)
        A)``: the paper's GSPO-token, ``s_t = sg[s] pi(y_t) / sg[pi(y_t)]``, whose value is s at every token.
    **Gradient**: ``s A_t grad log pi(y_t)``, and none in a sequence whose ratio is clipped. On-policy (s = 1) each
        token has REINFORCE's gradient exactly, so the aggregation decides, as there. The paper's own objective, ``1/G
        sum_i min(s_i A_i, ...)`` with ``grad s = s / |y| sum_t grad log pi(y_t)``, is this with sequence_mean, wherever
        the tokens of a sequence share one advantage: there a sequence has 1 / |y| of REINFORCE's sum over its tokens.
        Off-policy s is no importance ratio (its |y|-th power is): biased by design, for less variance.
    Units: the advantage's. s lies closer to 1 than a token's ratio by about the root of |y|, and so do its bounds.

    Args:
        logprobs: as in `Surrogate.terms`; rows are whole sequences.
        old_logprobs: see there.
        advantages: see there.
        mask: see there.
        clip_low: largest distance of the sequence's ratio below 1 that still has a gradient.
        clip_high: largest distance above 1.

    Source: Zheng et al. 2025 (GSPO), arXiv 2507.18071, equations 5, 7 and 13.
    """
    log_ratios = policy_log_ratios(logprobs, old_logprobs, mask)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    of_sequence = (log_ratios.detach().sum(-1, keepdim=True) / lengths).expand_as(log_ratios)
    clipped = crossed(of_sequence.exp(), advantages, clip_low=clip_low, clip_high=clip_high)
    # value 1, gradient that of the token's log-probability: the paper's pi / sg[pi]
    own = (log_ratios - log_ratios.detach()).exp()
    ratios = of_sequence.where(~clipped, 0.0).exp() * own
    values = advantages * acting_bound(advantages, clip_low=clip_low, clip_high=clip_high).where(clipped, ratios)
    return SurrogateTerms(values=values.where(mask, 0.0), clipped=clipped & mask)
