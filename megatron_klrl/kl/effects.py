"""What trainers do around an unbiased configuration, and what it does to the KL: the audit's second table.

Group baselines and normalisations are enumerated over whole groups of independent responses; everything else over
responses. A row says how much of the intended gradient arrives (``scale``) and how much points elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.kl.config import Correction, Credit, Estimator, KLConfig, Placement
from megatron_klrl.kl.estimators import SAMPLED_ESTIMATORS, linear_tail
from megatron_klrl.kl.exact import Sharing, build_space, response_probs, sequence_kl_gradient, token_logprobs
from megatron_klrl.kl.measure import Problem, build_problem, chained, row_gradients
from megatron_klrl.kl.surrogate import leave_one_out_baseline, reward_coefficients

BETA = 0.3
CLAMP = 0.5
CLIP = 0.2
_STD_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One practice, measured.

    Attributes:
        practice: what is done.
        target: the exact gradient it should give.
        group_size: responses per group; None where groups play no part.
        scale: projection of the expected gradient on the target, in units of the target; 1 is right.
        off_direction: what is left beside the target's direction, in the same units; 0 is right.
        effective_beta: the beta that the mix of reward and KL gradient amounts to (stated: `BETA`); None for the KL
            alone.
        fraction: share of visited tokens touched by a clamp or clip; None where there is none.
    """

    practice: str
    target: str
    group_size: int | None = None
    scale: float
    off_direction: float
    effective_beta: float | None = None
    fraction: float | None = None


def measure_effects(*, seed: int) -> tuple[Effect, ...]:
    """All effects, on policies small enough to enumerate groups of four responses.

    Args:
        seed: of the policies' parameters and the 0/1 rewards.
    """
    on_policy, off_policy, rewards = _problems(seed=seed)
    return (
        *_group_effects(on_policy, rewards),
        *_aggregation_effects(on_policy),
        *_clamp_effects(on_policy),
        *_clip_effects(off_policy, rewards),
    )


def _problems(*, seed: int) -> tuple[Problem, Problem, Tensor]:
    space = build_space(num_prompts=2, vocab_size=3, max_tokens=2, sharing=Sharing.SHARED)
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(space.num_parameters, generator=generator, dtype=torch.float64)

    reference = noise(0.5)
    policy = reference + noise(0.6)
    rollout = policy + noise(0.3)
    rewards = torch.rand(space.tokens.shape[0], generator=generator, dtype=torch.float64).round()
    on_policy = build_problem(space, policy=policy, reference=reference, rollout=policy)
    return on_policy, build_problem(space, policy=policy, reference=reference, rollout=rollout), rewards


def _effect(
    gradient: Tensor, target: Tensor, *, practice: str, target_name: str, fraction: float | None = None
) -> Effect:
    scale, off_direction = _split(gradient, target)
    return Effect(practice=practice, target=target_name, scale=scale, off_direction=off_direction, fraction=fraction)


def _split(gradient: Tensor, target: Tensor) -> tuple[float, float]:
    scale = float(gradient @ target / target.square().sum())
    return scale, float((gradient - scale * target).norm() / target.norm())


# ------------------------------------------------------------------------------------------- group baselines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """All groups: ``rows`` ``[M, G]`` of the space, ``probs`` ``[M]``."""

    rows: Tensor
    probs: Tensor


def _groups(problem: Problem, *, group_size: int) -> _Groups:
    space = problem.space
    probs = response_probs(space, problem.policy) * space.num_prompts
    rows, weights = [], []
    for prompt in range(space.num_prompts):
        members = (space.prompts == prompt).nonzero().flatten()
        tuples = torch.cartesian_prod(*[members] * group_size).reshape(-1, group_size)
        rows.append(tuples)
        weights.append(probs[tuples].prod(-1) / space.num_prompts)
    return _Groups(rows=torch.cat(rows), probs=torch.cat(weights))


def _leave_one_out(scores: Tensor) -> Tensor:
    flat = scores.flatten()
    return (flat - leave_one_out_baseline(flat, group_size=scores.shape[1])).reshape(scores.shape)


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(-1, keepdim=True)


def _standardised(scores: Tensor) -> Tensor:
    return _centred(scores) / (scores.std(-1, keepdim=True) + _STD_FLOOR)


_Advantage = Callable[[Tensor, Tensor, Tensor], Tensor]
_GROUP_PRACTICES: dict[str, _Advantage] = {
    "leave-one-out on R - beta K1 (RLOO)": lambda r, k1, _: _leave_one_out(r - BETA * k1),
    "leave-one-out on R, - beta K1 without baseline": lambda r, k1, _: _leave_one_out(r) - BETA * k1,
    "group mean with self on R - beta K1 (Dr. GRPO)": lambda r, k1, _: _centred(r - BETA * k1),
    "group mean and std on R - beta K1 (GRPO)": lambda r, k1, _: _standardised(r - BETA * k1),
    "group mean and std on R, - beta K1 after": lambda r, k1, _: _standardised(r) - BETA * k1,
    "leave-one-out on R - beta K3": lambda r, _, k3: _leave_one_out(r - BETA * k3),
}


def _group_effects(problem: Problem, rewards: Tensor) -> list[Effect]:
    scores = problem.logprob_slopes.sum(1)
    reward_gradient = problem.expected(rewards[:, None] * scores)
    kl_gradient = sequence_kl_gradient(problem.space, problem.policy, problem.reference)
    k1, k3 = _summed(problem, Estimator.K1), _summed(problem, Estimator.K3)
    target = reward_gradient - BETA * kl_gradient
    effects = []
    for practice, advantage in _GROUP_PRACTICES.items():
        for group_size in (2, 3, 4):
            groups = _groups(problem, group_size=group_size)
            advantages = advantage(rewards[groups.rows], k1[groups.rows], k3[groups.rows])
            gradient = torch.einsum("m,mg,mgp->p", groups.probs, advantages, scores[groups.rows]) / group_size
            scale, off_direction = _split(gradient, target)
            effects.append(
                Effect(
                    practice=practice,
                    target="grad E[R] - beta grad KL",
                    group_size=group_size,
                    scale=scale,
                    off_direction=off_direction,
                    effective_beta=_effective_beta(gradient, reward_gradient, kl_gradient),
                )
            )
    return effects


def _summed(problem: Problem, estimator: Estimator) -> Tensor:
    """``[N]`` an estimate summed over the tokens of a response."""
    logprobs, ref_logprobs = _logprob_pair(problem)
    return SAMPLED_ESTIMATORS[estimator](logprobs, ref_logprobs).sum(-1)


def _logprob_pair(problem: Problem) -> tuple[Tensor, Tensor]:
    return token_logprobs(problem.space, problem.policy), token_logprobs(problem.space, problem.reference)


def _effective_beta(gradient: Tensor, reward_gradient: Tensor, kl_gradient: Tensor) -> float:
    """Ratio of the two weights that best mix reward and KL gradient into ``gradient``."""
    mixed = torch.linalg.lstsq(torch.stack([reward_gradient, -kl_gradient], 1), gradient[:, None]).solution
    return float(mixed[1] / mixed[0])


# ------------------------------------------------------------------------------------------- aggregation


_KL_TARGET = "grad KL(pi||ref)"
_K1_REWARD = KLConfig(beta=1.0)
_K3_BOTH = KLConfig(beta=1.0, estimator=Estimator.K3, placement=Placement.BOTH)


def _aggregation_effects(problem: Problem) -> list[Effect]:
    target = sequence_kl_gradient(problem.space, problem.policy, problem.reference)
    lengths = problem.space.mask.sum(-1).double()
    effects = []
    for config in (_K1_REWARD, _K3_BOTH):
        rows = row_gradients(problem, config)
        practices = {
            "sum over tokens, mean over sequences": problem.expected(rows),
            "mean over the tokens of each sequence": problem.expected(rows / lengths[:, None]),
            "mean over the tokens of a batch of 4": _batch_mean(problem, rows, lengths),
        }
        effects += [
            _effect(gradient, target, practice=f"{config.name}: {practice}", target_name=_KL_TARGET)
            for practice, gradient in practices.items()
        ]
    loss_half = row_gradients(
        problem, _K3_BOTH.model_copy(update={"placement": Placement.LOSS, "credit": Credit.TOKEN})
    )
    reward_half = row_gradients(problem, _K3_BOTH.model_copy(update={"placement": Placement.REWARD}))
    mixed = problem.expected(reward_half + loss_half / lengths[:, None])
    practice = f"{_K3_BOTH.name}: sum in the reward, token mean in the loss"
    return [*effects, _effect(mixed, target, practice=practice, target_name=_KL_TARGET)]


def _batch_mean(problem: Problem, rows: Tensor, lengths: Tensor) -> Tensor:
    """Mean over all tokens of four independent responses to a prompt, times the mean length, so that 1 is possible."""
    groups = _groups(problem, group_size=4)
    totals = lengths[groups.rows].sum(-1)
    mean_length = float(problem.probs() @ lengths)
    return mean_length * torch.einsum("m,mp->p", groups.probs / totals, rows[groups.rows].sum(1))


# ------------------------------------------------------------------------------------------- clamps


def _clamp_effects(problem: Problem) -> list[Effect]:
    target = sequence_kl_gradient(problem.space, problem.policy, problem.reference)
    effects = []
    for estimator in (Estimator.K1, Estimator.K3):
        for practice, clamped in {
            f"log-ratio clamped at {CLAMP}, gradient ends": _hard_clamp,
            f"log-ratio beyond {CLAMP} on a linear tail": _linear_tail,
        }.items():
            gradient, fraction = _with_both_halves(problem, estimator, clamped)
            name = f"both/{estimator}/to_go/none: {practice}"
            effects.append(_effect(gradient, target, practice=name, target_name=_KL_TARGET, fraction=fraction))
    return effects


_Clamped = Callable[[Problem, Tensor, Tensor, Estimator], Tensor]


def _hard_clamp(problem: Problem, logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    del problem  # padding is zero in both, and zero is inside the bound
    clamped = (logprobs - ref_logprobs).clamp(-CLAMP, CLAMP)
    return SAMPLED_ESTIMATORS[estimator](clamped, torch.zeros_like(clamped))


def _linear_tail(problem: Problem, logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    return linear_tail(logprobs, ref_logprobs, problem.space.mask, estimator=estimator, bound=CLAMP).values


def _with_both_halves(problem: Problem, estimator: Estimator, clamped: _Clamped) -> tuple[Tensor, float]:
    logprobs, ref_logprobs = _logprob_pair(problem)
    logprobs = logprobs.detach().requires_grad_()
    values = clamped(problem, logprobs, ref_logprobs, estimator)
    to_go = values.detach().flip(-1).cumsum(-1).flip(-1)
    gradients = chained(problem, (to_go * logprobs + values).sum(), logprobs=logprobs)
    return problem.expected(gradients), _visited_share(problem, (logprobs - ref_logprobs).abs() > CLAMP)


def _visited_share(problem: Problem, touched: Tensor) -> float:
    """Share of the visited tokens that are touched."""
    visits = problem.probs()[:, None] * problem.space.mask
    return float((visits * touched).sum() / visits.sum())


# ------------------------------------------------------------------------------------------- clipping


def _clip_effects(problem: Problem, rewards: Tensor) -> list[Effect]:
    """The KL's share of a PPO-clipped policy gradient, against the same without clipping."""
    space = problem.space
    logprobs, ref_logprobs = _logprob_pair(problem)
    rollout_logprobs = token_logprobs(space, problem.rollout)
    config = KLConfig(beta=BETA, correction=Correction.TOKEN)
    kl = reward_coefficients(logprobs, ref_logprobs, space.mask, config=config, rollout_logprobs=rollout_logprobs)
    ratios = (logprobs - rollout_logprobs).exp()
    advantages = (rewards - problem.probs() @ rewards)[:, None] - kl / ratios
    clipped = ((advantages > 0) & (ratios > 1 + CLIP)) | ((advantages < 0) & (ratios < 1 - CLIP))

    def gradient(coefficients: Tensor) -> Tensor:
        return problem.expected(torch.einsum("ns,nsp->np", coefficients, problem.logprob_slopes))

    unclipped, fraction = gradient(kl), _visited_share(problem, clipped)
    target_name = "the same, not clipped"
    practice = f"KL in the advantage, ratio clipped at {CLIP}"
    return [_effect(gradient(kl * ~clipped), unclipped, practice=practice, target_name=target_name, fraction=fraction)]
