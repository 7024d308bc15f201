"""The KL term that training minimises: the one implementation, which the trainer and the audit both run.

Its two sides can be had apart: `reward_coefficients` (what multiplies the score; as advantages with a leave-one-out
baseline, `reward_advantages`) and `loss_terms` (what is differentiated). Every value is summed over the tokens of a
sequence and scaled by beta; average over sequences, never over tokens, and normalise nothing.
"""

import torch
from torch import Tensor

from megatron_klrl.kl.catalogue import ratio_is_differentiable
from megatron_klrl.kl.config import Correction, Credit, Estimator, KLConfig, Placement
from megatron_klrl.kl.estimators import require_representable
from megatron_klrl.kl.inputs import TokenInputs, read_inputs


def kl_surrogate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    config: KLConfig,
    rollout_logprobs: Tensor | None = None,
    full_kl: Tensor | None = None,
) -> Tensor:
    """The KL part of what training minimises, one value per sequence.

    Value: ``(reward_coefficients * logprobs + loss_terms).sum(-1)``; a surrogate, not an estimate of the KL.
    **Gradient**: averaged over sequences of the policy that ``rollout_logprobs`` describes, beta times the expected
        gradient that the configuration's catalogue entry states.
    Units: nats times beta; accumulated in float32, or float64 where an input is. Nothing is clamped.

    Args:
        logprobs: ``[B, T]`` natural-log probabilities of the taken tokens under the current policy, with gradient.
        ref_logprobs: ``[B, T]`` the same tokens under the frozen reference.
        mask: ``[B, T]`` bool, true where the policy wrote the token. Anything may stand where it is false.
        config: estimator, placement, credit, correction and beta.
        rollout_logprobs: ``[B, T]`` under the policy that sampled; what ``correction`` corrects from. None: the samples
            are the current policy's own, so ratios have value 1 and keep their gradient. Unused with correction
            ``none``.
        full_kl: ``[B, T]`` per-position KL over the full vocabulary, with gradient; used by estimator ``exact`` only.

    Returns:
        ``[B]``.

    Raises:
        ValueError: shapes differ, the mask is not bool, ``full_kl`` is missing, or a value that counts is NaN or
        infinite.
        KLOverflowError: an estimate or ratio overflows; names the tokens.

    Source: arXiv 2512.21852 (placements); docs/kl/catalogue.md lists formula and source of every configuration.
    """
    inputs = read_inputs(
        logprobs, ref_logprobs, mask, config=config, rollout_logprobs=rollout_logprobs, full_kl=full_kl
    )
    if config.placement is Placement.LOSS:
        return _loss_terms(inputs, config).sum(-1)
    scored = _coefficients(inputs, config) * inputs.logprobs
    return (scored if config.placement is Placement.REWARD else scored + _loss_terms(inputs, config)).sum(-1)


def reward_coefficients(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    config: KLConfig,
    rollout_logprobs: Tensor | None = None,
    full_kl: Tensor | None = None,
) -> Tensor:
    """What multiplies each token's log-probability on the reward side: minus the KL's per-token advantage.

    Value: beta times the credited, importance-weighted estimates; zero where masked and with placement ``loss``.
    **Gradient**: none, detached. ``(coefficients * logprobs).sum(-1)`` carries the score-function half.
    Units: nats times beta.

    Args:
        logprobs: as in `kl_surrogate`, like everything else.
        ref_logprobs: see there.
        mask: see there.
        config: see there.
        rollout_logprobs: see there.
        full_kl: see there.

    Returns:
        ``[B, T]``, detached.

    Raises:
        ValueError: see `kl_surrogate`.
        KLOverflowError: see there.

    Source: Tang & Munos 2025, arXiv 2506.09477.
    """
    inputs = read_inputs(
        logprobs, ref_logprobs, mask, config=config, rollout_logprobs=rollout_logprobs, full_kl=full_kl
    )
    return _coefficients(inputs, config)


def loss_terms(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    config: KLConfig,
    rollout_logprobs: Tensor | None = None,
    full_kl: Tensor | None = None,
) -> Tensor:
    """What the loss side differentiates, per token.

    Value: beta times the estimates, times their importance ratio; zero where masked and with placement ``reward``.
        For k2 on the sequence's log-ratio, the token's share of the square.
    **Gradient**: the path-wise half; with a differentiable ratio the score-function half too.
    Units: nats times beta.

    Args:
        logprobs: as in `kl_surrogate`, like everything else.
        ref_logprobs: see there.
        mask: see there.
        config: see there.
        rollout_logprobs: see there.
        full_kl: see there.

    Returns:
        ``[B, T]``, to be summed over tokens and averaged over sequences.

    Raises:
        ValueError: see `kl_surrogate`.
        KLOverflowError: see there.

    Source: arXiv 2512.21852; with ratios arXiv 2512.02556 (token) and arXiv 1802.05098 (prefix).
    """
    inputs = read_inputs(
        logprobs, ref_logprobs, mask, config=config, rollout_logprobs=rollout_logprobs, full_kl=full_kl
    )
    return _loss_terms(inputs, config)


def reward_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    config: KLConfig,
    group_size: int,
    rollout_logprobs: Tensor | None = None,
    full_kl: Tensor | None = None,
) -> Tensor:
    """The KL's per-token advantages: minus the coefficients, plus a leave-one-out baseline over each prompt's group.

    Value: ``-(coefficients - ratio * baseline)``, the baseline being the mean of the other members' credited KL: of the
        whole sequence with credit ``sequence``, at the same column otherwise.
    **Gradient**: none, detached. ``-(advantages * logprobs).sum(-1).mean()`` has the expected gradient of the reward
        side of `kl_surrogate`: the baseline does not depend on the sequence it is applied to, and multiplies a score
        whose expectation under ``ratio`` is zero. ``ratio`` is 1 for correction ``none``, rho_t for ``token``, c_t
        for ``prefix``, w for ``sequence``. (Off-policy with correction ``none`` neither is unbiased.)
    Units: nats times beta. Do not normalise them with the task reward's: beta would change its meaning.

    Args:
        logprobs: as in `kl_surrogate`, like everything else.
        ref_logprobs: see there.
        mask: see there.
        config: see there.
        group_size: members of a group, which stand in consecutive rows; 1 means no baseline.
        rollout_logprobs: see there.
        full_kl: see there.

    Returns:
        ``[B, T]``, detached; zero where masked and with placement ``loss``.

    Raises:
        ValueError: see `kl_surrogate`; or the batch is not a whole number of groups.
        KLOverflowError: see there.

    Source: Ahmadian et al. 2024 (RLOO), arXiv 2402.14740; Tang & Munos 2025, arXiv 2506.09477.
    """
    inputs = read_inputs(
        logprobs, ref_logprobs, mask, config=config, rollout_logprobs=rollout_logprobs, full_kl=full_kl
    )
    if config.placement is Placement.LOSS:
        require_whole_groups(inputs.logprobs.shape[0], group_size=group_size)
        return torch.zeros_like(inputs.logprobs, requires_grad=False)
    credited = _credited_kl(inputs, config)
    baseline = _baseline_ratios(inputs, config) * leave_one_out_baseline(credited, group_size=group_size)
    return _checked(config.beta * (baseline - _scored(credited, inputs, config)), inputs)


def leave_one_out_baseline(values: Tensor, *, group_size: int) -> Tensor:
    """The mean of the other members of each group.

    Value: for row i, the mean over the rows j != i of its group; zero for groups of one.
    **Gradient**: that of the mean; callers pass detached values.

    Args:
        values: ``[B, ...]``, groups in consecutive rows.
        group_size: members of a group.

    Returns:
        Same shape as ``values``.

    Raises:
        ValueError: ``group_size`` is below 1 or does not divide B.

    Source: Ahmadian et al. 2024 (RLOO), arXiv 2402.14740.
    """
    require_whole_groups(values.shape[0], group_size=group_size)
    if group_size == 1:
        return torch.zeros_like(values)
    groups = values.reshape(-1, group_size, *values.shape[1:])
    others = groups.sum(1, keepdim=True) - groups
    return (others / (group_size - 1)).reshape(values.shape)


def require_whole_groups(num_rows: int, *, group_size: int) -> None:
    """Raises ValueError unless ``num_rows`` is a multiple of ``group_size``."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, is {group_size}")
    if num_rows % group_size != 0:
        raise ValueError(f"{num_rows} sequences are not a whole number of groups of {group_size}")


def _credited_kl(inputs: TokenInputs, config: KLConfig) -> Tensor:
    """``[B, T]``, detached: the KL each token answers for, with the ratios that belong to the KL's own terms."""
    with torch.no_grad():
        terms = inputs.estimates(config.estimator)
        if config.correction is Correction.PREFIX:
            terms = terms * inputs.prefix_ratios(config.estimator)
        credited = _credited(terms, config)
        return credited * inputs.sequence_ratios() if config.correction is Correction.SEQUENCE else credited


def _baseline_ratios(inputs: TokenInputs, config: KLConfig) -> Tensor:
    """``[B, T]``, detached: the ratio under which a token's score has expectation zero: a baseline may stand."""
    with torch.no_grad():
        if config.correction is Correction.TOKEN:
            return inputs.token_ratios()
        if config.correction is Correction.PREFIX:
            # For every estimator the ratio that includes the scored token, also where the KL's own ratio does not.
            return inputs.prefix_ratios(Estimator.K1)
        if config.correction is Correction.SEQUENCE:
            return inputs.sequence_ratios().expand_as(inputs.logprobs)
        return torch.ones_like(inputs.logprobs)


def _scored(credited: Tensor, inputs: TokenInputs, config: KLConfig) -> Tensor:
    """``[B, T]``, detached: with the ratio that belongs to the scored token rather than to the KL it answers for."""
    if config.correction is Correction.TOKEN:
        return inputs.token_ratios().detach() * credited
    return credited


def _credited(terms: Tensor, config: KLConfig) -> Tensor:
    """``[B, T]``: the sum of the terms that each token answers for."""
    if config.credit is Credit.TOKEN:
        return terms
    if config.credit is Credit.SEQUENCE:
        return terms.sum(-1, keepdim=True).expand_as(terms)
    to_go = terms.flip(-1).cumsum(-1).flip(-1)
    # A position's full-vocabulary KL is settled before its token is written: only earlier tokens answer for it.
    return to_go - terms if config.estimator is Estimator.EXACT else to_go


def _coefficients(inputs: TokenInputs, config: KLConfig) -> Tensor:
    if config.placement is Placement.LOSS:
        return torch.zeros_like(inputs.logprobs, requires_grad=False)
    return _checked(config.beta * _scored(_credited_kl(inputs, config), inputs, config), inputs)


def _loss_terms(inputs: TokenInputs, config: KLConfig) -> Tensor:
    if config.placement is Placement.REWARD:
        return torch.zeros_like(inputs.logprobs, requires_grad=False)
    terms = inputs.estimates(config.estimator)
    if config.placement is Placement.LOSS and config.credit is Credit.SEQUENCE:
        log_ratios = inputs.estimates(Estimator.K1)
        terms = log_ratios.sum(-1, keepdim=True) * log_ratios / 2
    ratios = _loss_ratios(inputs, config)
    if ratios is not None:
        terms = terms * (ratios if ratio_is_differentiable(config.axes) else ratios.detach())
    return _checked(config.beta * terms, inputs)


def _loss_ratios(inputs: TokenInputs, config: KLConfig) -> Tensor | None:
    if config.correction is Correction.TOKEN:
        return inputs.token_ratios()
    if config.correction is Correction.PREFIX:
        return inputs.prefix_ratios(config.estimator)
    if config.correction is Correction.SEQUENCE:
        return inputs.sequence_ratios()
    return None


def _checked(values: Tensor, inputs: TokenInputs) -> Tensor:
    """Zero where masked, and finite: products of finite factors can still overflow."""
    masked = torch.where(inputs.mask, values, 0.0)
    require_representable(masked, lambda: inputs.logprobs.detach() - inputs.ref_logprobs, what="the KL term")
    return masked
