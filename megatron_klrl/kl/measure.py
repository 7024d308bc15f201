"""The production surrogate under enumeration: expected gradients and one-sample variances without sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.kl.config import KLConfig
from megatron_klrl.kl.exact import (
    Space,
    forward_token_kl_gradient,
    response_probs,
    rollout_kl_gradient,
    sequence_kl_gradient,
    state_kl,
    state_logprobs,
    token_kl,
    token_kl_gradient,
    token_logprobs,
)
from megatron_klrl.kl.expectation import ExpectedGradient, Term
from megatron_klrl.kl.surrogate import kl_surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A policy, its reference, the policy that sampled, and how log-probabilities move with the parameters.

    Attributes:
        space: all responses.
        policy: ``[P]``.
        reference: ``[P]``.
        rollout: ``[P]``; on-policy, equal to ``policy``.
        logprob_slopes: ``[N, S, P]`` gradients of the written tokens' log-probabilities; zero where masked.
        kl_slopes: ``[N, S, P]`` gradients of the full-vocabulary KL at a column; zero where masked.
    """

    space: Space
    policy: Tensor
    reference: Tensor
    rollout: Tensor
    logprob_slopes: Tensor
    kl_slopes: Tensor

    def probs(self) -> Tensor:
        """``[N]`` probability of each row under the policy that sampled."""
        return response_probs(self.space, self.rollout)

    def expected(self, row_gradients: Tensor) -> Tensor:
        """``[P]`` mean of ``[N, P]`` gradients of the rows."""
        return self.probs() @ row_gradients


def build_problem(space: Space, *, policy: Tensor, reference: Tensor, rollout: Tensor) -> Problem:
    """A problem with its slopes."""
    logprobs = torch.func.jacrev(lambda parameters: state_logprobs(space, parameters))(policy)
    kl = torch.func.jacrev(lambda parameters: state_kl(space, parameters, reference))(policy)
    counts = space.mask[..., None]
    return Problem(
        space=space,
        policy=policy,
        reference=reference,
        rollout=rollout,
        logprob_slopes=torch.where(counts, logprobs[space.states, space.tokens], 0.0),
        kl_slopes=torch.where(counts, kl[space.states], 0.0),
    )


def row_gradients(problem: Problem, config: KLConfig) -> Tensor:
    """``[N, P]`` gradient of `kl_surrogate` for every response, with NaN wherever the mask is false."""
    space = problem.space
    logprobs = _unreadable_padding(space, token_logprobs(space, problem.policy)).requires_grad_()
    full_kl = _unreadable_padding(space, token_kl(space, problem.policy, problem.reference)).requires_grad_()
    surrogate = kl_surrogate(
        logprobs,
        _unreadable_padding(space, token_logprobs(space, problem.reference)),
        space.mask,
        config=config,
        rollout_logprobs=_unreadable_padding(space, token_logprobs(space, problem.rollout)),
        full_kl=full_kl,
    )
    return chained(problem, surrogate.sum(), logprobs=logprobs, full_kl=full_kl)


def chained(problem: Problem, value: Tensor, *, logprobs: Tensor, full_kl: Tensor | None = None) -> Tensor:
    """``[N, P]`` parameter gradients of a sum over rows, from its gradients in log-probabilities and full KLs."""
    leaves = [logprobs] if full_kl is None else [logprobs, full_kl]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    total = torch.einsum("ns,nsp->np", gradients[0], problem.logprob_slopes)
    if full_kl is not None:
        total = total + torch.einsum("ns,nsp->np", gradients[1], problem.kl_slopes)
    return total


def variance(problem: Problem, gradients: Tensor) -> float:
    """Trace of the covariance of one sample's gradient."""
    mean = problem.expected(gradients)
    return float(problem.probs() @ gradients.square().sum(-1) - mean.square().sum())


def exact_gradients(problem: Problem) -> dict[Term, Tensor]:
    """Every exact gradient that expectations are made of, from the oracle."""
    space, policy, reference, rollout = problem.space, problem.policy, problem.reference, problem.rollout
    return {
        Term.REVERSE_SEQUENCE: sequence_kl_gradient(space, policy, reference),
        Term.REVERSE_TOKEN: token_kl_gradient(space, policy, reference, prefixes=policy),
        Term.REVERSE_TOKEN_ROLLOUT: token_kl_gradient(space, policy, reference, prefixes=rollout),
        Term.FORWARD_TOKEN: forward_token_kl_gradient(space, policy, reference, prefixes=policy),
        Term.FORWARD_TOKEN_ROLLOUT: forward_token_kl_gradient(space, policy, reference, prefixes=rollout),
        Term.ROLLOUT_SEQUENCE: rollout_kl_gradient(space, policy, rollout),
    }


def claimed_gradient(claim: ExpectedGradient, exact: dict[Term, Tensor]) -> Tensor | None:
    """What a catalogue entry says the expectation is; None where it says no combination."""
    if claim.terms is None:
        return None
    zero = torch.zeros_like(exact[Term.REVERSE_SEQUENCE])
    return sum((factor * exact[term] for term, factor in claim.terms.items()), start=zero)


def relative_error(gradient: Tensor, target: Tensor) -> float:
    """Distance to the target in units of the target."""
    return float((gradient - target).norm() / target.norm())


def cosine(gradient: Tensor, target: Tensor) -> float | None:
    """Cosine of the angle; None where the gradient is zero to rounding."""
    if float(gradient.norm()) <= 1e-12 * float(target.norm()):
        return None
    return float(gradient @ target / (gradient.norm() * target.norm()))


def _unreadable_padding(space: Space, values: Tensor) -> Tensor:
    """NaN where the mask is false: if the surrogate read it, every number of the audit would show it."""
    return torch.where(space.mask, values, float("nan")).detach()
