"""Which divergence's gradient each configuration follows, derived from its two halves. Imports no torch.

A surrogate is a sum of a score-function half (reward side: detached estimate times score) and a path-wise half (loss
side: differentiated estimate). Each half has a known expectation in terms of a few exact gradients; a differentiable
ratio in the loss brings its own score-function half along. The audit measures every sum by enumeration and holds it
against this.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron_klrl.kl.axes import Axes, Correction, Credit, Estimator, Objective, Placement


class Term(StrEnum):
    """An exact gradient that expectations are made of; after the semicolon, whose prefixes are held fixed."""

    REVERSE_SEQUENCE = "grad KL(pi||ref)"
    REVERSE_TOKEN = "grad KL_tok(pi||ref; pi)"
    REVERSE_TOKEN_ROLLOUT = "grad KL_tok(pi||ref; mu)"
    FORWARD_TOKEN = "grad KL_tok(ref||pi; pi)"
    FORWARD_TOKEN_ROLLOUT = "grad KL_tok(ref||pi; mu)"
    ROLLOUT_SEQUENCE = "grad KL(mu||pi)"


_ON_ROLLOUT_PREFIXES = {
    Term.REVERSE_TOKEN: Term.REVERSE_TOKEN_ROLLOUT,
    Term.FORWARD_TOKEN: Term.FORWARD_TOKEN_ROLLOUT,
}
_OBJECTIVE_TERMS = {
    Objective.SEQUENCE: frozenset({Term.REVERSE_SEQUENCE}),
    Objective.TOKEN: frozenset({Term.REVERSE_TOKEN, Term.REVERSE_TOKEN_ROLLOUT}),
}


class Verdict(StrEnum):
    """How a configuration relates to an objective."""

    UNBIASED = "unbiased"
    UNBIASED_ON_POLICY = "unbiased_on_policy"
    BIASED = "biased"
    ZERO = "zero"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedGradient:
    """Expectation of a surrogate's gradient, per unit of beta.

    Attributes:
        terms: whole multiples of exact gradients (empty: zero), or None when it is no combination of them.
    """

    terms: Mapping[Term, int] | None

    def follows(self, objective: Objective) -> bool:
        """Whether it is the gradient of ``objective``, once."""
        if self.terms is None or len(self.terms) != 1:
            return False
        ((term, factor),) = self.terms.items()
        return factor == 1 and term in _OBJECTIVE_TERMS[objective]

    def text(self) -> str:
        """The expectation as a formula."""
        if self.terms is None:
            return "no combination of KL gradients"
        if not self.terms:
            return "0"
        pieces = [f"{_sign(factor)} {term}" for term, factor in self.terms.items()]
        return " ".join(pieces).removeprefix("+ ")


def _sign(factor: int) -> str:
    return {1: "+", -1: "-"}.get(factor, f"{factor:+d}")


def expected_gradient(axes: Axes, *, on_policy: bool) -> ExpectedGradient:
    """What the gradient of the surrogate is on average.

    Args:
        axes: a combination with meaning.
        on_policy: the samples come from the policy itself; otherwise from another policy ``mu`` that
            ``rollout_logprobs`` describes.
    """
    if on_policy or axes.correction in (Correction.PREFIX, Correction.SEQUENCE):
        return ExpectedGradient(terms=_current_policy_terms(axes))
    if axes.correction is Correction.TOKEN:
        return ExpectedGradient(terms=_token_ratio_terms(axes))
    return ExpectedGradient(terms=_uncorrected_terms(axes))


def verdict(axes: Axes, objective: Objective) -> Verdict:
    """How the configuration relates to ``objective``, on- and off-policy taken together."""
    on_policy = expected_gradient(axes, on_policy=True)
    if on_policy.terms is not None and not on_policy.terms:
        return Verdict.ZERO
    if not on_policy.follows(objective):
        return Verdict.BIASED
    off_policy = expected_gradient(axes, on_policy=False)
    return Verdict.UNBIASED if off_policy.follows(objective) else Verdict.UNBIASED_ON_POLICY


def _current_policy_terms(axes: Axes) -> Mapping[Term, int] | None:
    """Expectation when samples are, or are exactly reweighted to be, the policy's own."""
    total: Counter[Term] = Counter()
    credit = _score_half_credit(axes)
    if credit is not None:
        half = _score_half(axes.estimator, credit)
        if half is None:
            return None
        total.update(half)
    if axes.placement is not Placement.REWARD:
        half = _path_half(axes)
        if half is None:
            return None
        total.update(half)
    return {term: factor for term, factor in total.items() if factor != 0}


def _score_half_credit(axes: Axes) -> Credit | None:
    """Credit of the score-function half; None where there is none."""
    if axes.placement is not Placement.LOSS:
        return axes.credit
    if axes.correction is Correction.PREFIX:
        return Credit.TO_GO
    if axes.correction is Correction.TOKEN and axes.estimator is not Estimator.K2:
        return Credit.TOKEN
    return None


def _score_half(estimator: Estimator, credit: Credit) -> Mapping[Term, int] | None:
    reverse = Term.REVERSE_TOKEN if credit is Credit.TOKEN else Term.REVERSE_SEQUENCE
    if estimator is Estimator.K1:
        return {reverse: 1}
    if estimator is Estimator.K3:
        return {reverse: 1, Term.FORWARD_TOKEN: -1}
    if estimator is Estimator.EXACT:
        return {Term.REVERSE_SEQUENCE: 1, Term.REVERSE_TOKEN: -1}
    return None


def _path_half(axes: Axes) -> Mapping[Term, int] | None:
    if axes.estimator is Estimator.K1:
        return {}
    if axes.estimator is Estimator.K2:
        squared_sum = axes.placement is Placement.LOSS and axes.credit is Credit.SEQUENCE
        return {Term.REVERSE_SEQUENCE if squared_sum else Term.REVERSE_TOKEN: 1}
    if axes.estimator is Estimator.K3:
        return {Term.FORWARD_TOKEN: 1}
    if axes.estimator is Estimator.EXACT:
        return {Term.REVERSE_TOKEN: 1}
    return None


def _token_ratio_terms(axes: Axes) -> Mapping[Term, int] | None:
    """A token ratio corrects the token and leaves the prefixes where the rollout policy went."""
    if _score_half_credit(axes) not in (None, Credit.TOKEN):
        return None
    return _on_rollout_prefixes(_current_policy_terms(axes))


def _uncorrected_terms(axes: Axes) -> Mapping[Term, int] | None:
    if axes.placement is not Placement.LOSS:
        return None
    if axes.estimator is Estimator.EXACT:
        return _on_rollout_prefixes(_current_policy_terms(axes))
    if axes.estimator is Estimator.K1:
        # Minimising sum(log pi) on samples of mu is descending -KL(mu||pi): it pushes the policy away from its data.
        return {Term.ROLLOUT_SEQUENCE: -1}
    return None


def _on_rollout_prefixes(terms: Mapping[Term, int] | None) -> Mapping[Term, int] | None:
    if terms is None:
        return None
    return {_ON_ROLLOUT_PREFIXES.get(term, term): factor for term, factor in terms.items()}
