"""The audit: every configuration's expected gradient, computed with the production code, against exact gradients."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_klrl.kl.catalogue import CatalogueEntry, catalogue
from megatron_klrl.kl.config import KLConfig, Objective
from megatron_klrl.kl.effects import Effect, measure_effects
from megatron_klrl.kl.exact import Sharing, Space, build_space, sequence_kl
from megatron_klrl.kl.expectation import Term, Verdict
from megatron_klrl.kl.measure import (
    Problem,
    build_problem,
    claimed_gradient,
    cosine,
    exact_gradients,
    relative_error,
    row_gradients,
    variance,
)

TOLERANCE = 1e-8
"""Relative error below which two gradients are the same; float64 rounding stays near 1e-14."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An expected gradient beside an exact one.

    Attributes:
        relative_error: distance in units of the exact gradient.
        cosine: of the angle between them; None where the expected gradient is zero.
    """

    relative_error: float
    cosine: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One configuration under one sampling, beta 1.

    Attributes:
        norm: of the expected gradient, in units of the sequence-level gradient.
        variance: trace of the covariance of one sample's gradient.
        sequence: against the gradient of the sequence-level KL(policy || reference).
        token_policy_prefixes: against the token-level KL, prefixes visited by the policy.
        token_rollout_prefixes: against the token-level KL, prefixes visited by the policy that sampled.
        expected: what the catalogue says the expected gradient is.
        expected_error: relative to the sequence-level gradient; None where the catalogue says no combination.
    """

    norm: float
    variance: float
    sequence: Comparison
    token_policy_prefixes: Comparison
    token_rollout_prefixes: Comparison
    expected: str
    expected_error: float | None

    def is_zero(self) -> bool:
        """Whether nothing is applied on average."""
        return self.norm <= TOLERANCE

    def follows(self, objective: Objective) -> bool:
        """Whether it is the objective's gradient to `TOLERANCE`; either prefix distribution counts for the token's."""
        if objective is Objective.SEQUENCE:
            return self.sequence.relative_error <= TOLERANCE
        return self.token_prefixes() is not None

    def token_prefixes(self) -> str | None:
        """Whose prefixes the followed token-level KL has; None when it follows none."""
        if self.token_policy_prefixes.relative_error <= TOLERANCE:
            return "policy"
        return "rollout" if self.token_rollout_prefixes.relative_error <= TOLERANCE else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One configuration: what the catalogue claims and what was measured."""

    entry: CatalogueEntry
    on_policy: Measurement
    off_policy: Measurement

    def measured_verdict(self, objective: Objective) -> Verdict:
        """The verdict the numbers give."""
        if self.on_policy.is_zero():
            return Verdict.ZERO
        if not self.on_policy.follows(objective):
            return Verdict.BIASED
        return Verdict.UNBIASED if self.off_policy.follows(objective) else Verdict.UNBIASED_ON_POLICY

    def holds(self) -> bool:
        """Whether verdicts and expected gradients of the catalogue are what was measured."""
        errors = (self.on_policy.expected_error, self.off_policy.expected_error)
        return all(error is None or error <= TOLERANCE for error in errors) and all(
            self.measured_verdict(objective) is self.entry.verdict(objective) for objective in Objective
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        config = self.entry.config
        return {
            "name": self.entry.name,
            "config": {
                "estimator": config.estimator.value,
                "placement": config.placement.value,
                "credit": config.credit.value,
                "correction": config.correction.value,
            },
            "formula": self.entry.formula,
            "source": self.entry.source,
            "shipped": [asdict(shipped) for shipped in self.entry.shipped],
            "verdict": {objective.value: self.entry.verdict(objective).value for objective in Objective},
            "measured_verdict": {objective.value: self.measured_verdict(objective).value for objective in Objective},
            "holds": self.holds(),
            "on_policy": asdict(self.on_policy) | {"token_prefixes": self.on_policy.token_prefixes()},
            "off_policy": asdict(self.off_policy) | {"token_prefixes": self.off_policy.token_prefixes()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Both tables, and the problem they were measured on.

    Attributes:
        problem: sizes and distances of the enumerated policies.
        rows: one per catalogue entry.
        effects: what clamps, normalisations and clipping around a configuration do to it.
    """

    problem: dict[str, float]
    rows: tuple[AuditRow, ...]
    effects: tuple[Effect, ...]

    def failures(self) -> tuple[str, ...]:
        """Names of the configurations whose claims do not hold."""
        return tuple(row.entry.name for row in self.rows if not row.holds())

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "tolerance": TOLERANCE,
            "holds": not self.failures(),
            "failures": list(self.failures()),
            "problem": self.problem,
            "rows": [row.to_dict() for row in self.rows],
            "effects": [asdict(effect) for effect in self.effects],
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def run_audit(*, seed: int = 0, num_prompts: int = 3, vocab_size: int = 3, max_tokens: int = 4) -> AuditReport:
    """Enumerates small autoregressive policies and measures every catalogue entry on them; a few seconds on one core.

    Parameters are shared across prefixes, prompts differ in length, every response ends with the end-of-sequence token
    or at the limit. Everything is float64; nothing is sampled.

    Args:
        seed: of the policies' parameters.
        num_prompts: equally likely prompts.
        vocab_size: with the end-of-sequence token; at least 2.
        max_tokens: length limit of a response; at least 2, or sequence and token objectives are the same.

    Raises:
        ValueError: a size is too small to tell the objectives apart.
    """
    if num_prompts < 1 or vocab_size < 2 or max_tokens < 2:
        raise ValueError(
            f"audit: num_prompts {num_prompts}, vocab_size {vocab_size}, max_tokens {max_tokens} is too small; "
            "at least 1, 2 and 2"
        )
    space = build_space(num_prompts=num_prompts, vocab_size=vocab_size, max_tokens=max_tokens, sharing=Sharing.SHARED)
    problems = _problems(space, seed=seed)
    rows = _rows(problems, catalogue())
    return AuditReport(problem=_describe(problems[1], seed=seed), rows=rows, effects=measure_effects(seed=seed))


def audit_configuration(config: KLConfig, *, seed: int = 0) -> AuditRow:
    """The row of one configuration, on the policies of ``run_audit``: a run keeps it beside its results."""
    space = build_space(num_prompts=3, vocab_size=3, max_tokens=4, sharing=Sharing.SHARED)
    (row,) = _rows(_problems(space, seed=seed), [entry for entry in catalogue() if entry.config.axes == config.axes])
    return row


def _rows(problems: tuple[Problem, Problem], entries: Iterable[CatalogueEntry]) -> tuple[AuditRow, ...]:
    on_policy, off_policy = problems
    exact = (exact_gradients(on_policy), exact_gradients(off_policy))
    return tuple(
        AuditRow(
            entry=entry,
            on_policy=_measure(on_policy, exact[0], entry, on_policy=True),
            off_policy=_measure(off_policy, exact[1], entry, on_policy=False),
        )
        for entry in entries
    )


def _problems(space: Space, *, seed: int) -> tuple[Problem, Problem]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(space.num_parameters, generator=generator, dtype=torch.float64)

    reference = noise(0.5)
    policy = reference + noise(0.4)
    rollout = policy + noise(0.25)
    problem = build_problem(space, policy=policy, reference=reference, rollout=rollout)
    return build_problem(space, policy=policy, reference=reference, rollout=policy), problem


def _measure(problem: Problem, exact: dict[Term, Tensor], entry: CatalogueEntry, *, on_policy: bool) -> Measurement:
    gradients = row_gradients(problem, entry.config)
    expected = problem.expected(gradients)
    unit = exact[Term.REVERSE_SEQUENCE].norm()
    claim = entry.expected_gradient(on_policy=on_policy)
    claimed = claimed_gradient(claim, exact)

    def compared(term: Term) -> Comparison:
        return Comparison(relative_error=relative_error(expected, exact[term]), cosine=cosine(expected, exact[term]))

    return Measurement(
        norm=float(expected.norm() / unit),
        variance=variance(problem, gradients),
        sequence=compared(Term.REVERSE_SEQUENCE),
        token_policy_prefixes=compared(Term.REVERSE_TOKEN),
        token_rollout_prefixes=compared(Term.REVERSE_TOKEN_ROLLOUT),
        expected=claim.text(),
        expected_error=None if claimed is None else float((expected - claimed).norm() / unit),
    )


def _describe(problem: Problem, *, seed: int) -> dict[str, float]:
    space = problem.space
    return {
        "seed": seed,
        "prompts": space.num_prompts,
        "vocabulary": space.design.shape[1],
        "responses": space.tokens.shape[0],
        "prefixes": space.design.shape[0],
        "parameters": space.num_parameters,
        "kl_policy_reference": float(sequence_kl(space, problem.policy, problem.reference)),
        "kl_rollout_policy": float(sequence_kl(space, problem.rollout, problem.policy)),
    }
