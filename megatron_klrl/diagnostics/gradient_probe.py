"""The KL term of a recipe on the real model: is it there, does beta scale it, does following it lower the exact KL?

The audit proves expectations on small enumerable policies. This looks at the sharded model, its loss and its engine, on
samples: start at the reference, move the policy away by noise, take the KL term's gradient by itself through the code
that trains, step against it and sample again.

A step along any direction changes the KL, also one along noise, and with enough samples the change is significant. The
question is whether the *expected* gradient lowers the KL. So the error of the decrease has two parts: that of sampling
before and after the step, and that of the gradient, on which batches that were sampled apart disagree.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.config.describe import kl_text
from megatron_klrl.config.recipe import Dtype, Recipe
from megatron_klrl.diagnostics.report import Check, Report, Verdict, verdict
from megatron_klrl.kl.config import Credit, Estimator, KLConfig, Placement
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.rollout import collate, rollouts
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.losses.policy_loss import kl_part
from megatron_klrl.runtime import seeds

START_TOLERANCE = {Dtype.FP32: 1e-5, Dtype.BF16: 1e-2}
"""Nats per sequence that a policy may seem to be away from itself, by rounding."""
VANISHED = 1e-3
"""Largest norm of a vanishing gradient, as a share of the gradient's norm away from the reference."""
LINEARITY_TOLERANCE = 1e-4
"""Relative distance between the gradient at twice beta and twice the gradient."""
STEP_SHARE = 0.2
"""Share of the exact KL that the step would take away if the KL fell along its tangent."""
STANDARD_ERRORS = 2.0
"""By which a decrease must stand out."""

_FAR_ENOUGH = 0.2  # nats per sequence: well above rounding, and still a policy that speaks
_FIRST_SCALE, _GROWTH, _ROUNDS = 0.02, 1.5, 8  # of the noise, relative to each tensor; until the policy is far enough


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A batch with its scores, and the exact KL of each sequence, nats ``[B]``."""

    batch: RolloutBatch
    scores: TokenScores
    full_kl: Tensor

    @property
    def mean(self) -> float:
        return float(self.full_kl.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradient:
    """The KL term's gradient away from the reference.

    Attributes:
        norm: L2, beta included.
        norm_doubled: at twice beta.
        gap: ``|g(2 beta) - 2 g(beta)|``.
    """

    norm: float
    norm_doubled: float
    gap: float

    @property
    def nonlinearity(self) -> float:
        return self.gap / (2 * self.norm) if self.norm > 0 else math.nan


class GradientProbe:
    """One probe over all ranks; every rank runs the same code and ends with the same report.

    It moves the trainer's weights and the engine's, and leaves them moved.
    """

    def __init__(self, parts: Parts, *, batches: int) -> None:
        """Take the parts of a run, with trainer and engine at the reference.

        Args:
            parts: of the run; ``kl.beta`` is positive.
            batches: of the recipe's size, to take the gradient from, and as many again to measure the descent with; at
                least 2, from whose differences the gradient's error is estimated.
        """
        self._parts, self._recipe, self._batches = parts, parts.recipe, batches
        self._version, self._scale = 0, 0.0

    def run(self) -> Report:
        """All checks: 3 times ``batches`` and a few are sampled, and 4 times ``batches`` go backward."""
        start = self._sample("start", batches=1)
        start_norm = self._take_gradient(start, self._recipe)
        away = self._leave_reference()
        found, before = (self._sample(purpose, batches=self._batches) for purpose in ("gradient", "descent"))
        slopes = self._slopes(found, before)
        gradient = self._gradient(found)
        eta = _step_size(before.mean, gradient.norm, beta=self._recipe.kl.beta)
        self._parts.trainer.move(eta=eta)
        self._push()
        after = self._sample("descent", batches=self._batches)
        checks = (
            _kl_at_start(start.mean, START_TOLERANCE[self._recipe.precision.dtype]),
            _gradient_at_start(start_norm, gradient.norm, self._recipe.kl),
            _kl_away(away, START_TOLERANCE[self._recipe.precision.dtype]),
            _gradient_away(gradient),
            _linear(gradient),
            descent_check(before.full_kl, after.full_kl, tangent=eta * slopes, group_size=self._recipe.loop.group_size),
        )
        return Report(subject=f"KL term: {kl_text(self._recipe)}", facts=self._facts(), checks=checks)

    def _facts(self) -> dict[str, float | str]:
        loop = self._recipe.loop
        prompts = self._batches * loop.prompts_per_step
        return {
            "configuration": self._recipe.kl.name,
            "beta": self._recipe.kl.beta,
            "prompts": prompts,
            "sequences": prompts * loop.group_size,
            "noise": self._scale,
        }

    def _sample(self, purpose: str, *, batches: int) -> _Scored:
        """Sample and score; the same prompts and seeds whenever the purpose is the same."""
        parts, recipe = self._parts, self._recipe
        found = rollouts(
            parts,
            parts.task,
            parts.task.prompts(0, batches * recipe.loop.prompts_per_step),
            samples=recipe.loop.group_size,
            temperature=recipe.generation.temperature,
            purpose=("probe", purpose),
        )
        batch = collate(found, device=parts.world.device)
        scores = parts.trainer.score(batch)
        if scores.full_kl is None:
            raise ValueError("the probe needs a reference: kl.beta > 0")
        return _Scored(batch=batch, scores=scores, full_kl=scores.full_kl.where(batch.response_mask, 0.0).sum(-1))

    def _push(self) -> None:
        self._version += 1
        self._parts.engine.update_weights(self._parts.trainer.export_weights(), version=self._version)

    def _leave_reference(self) -> float:
        """Add noise until the policy is far enough from the reference; the exact KL reached."""
        square = 0.0
        for number in range(_ROUNDS):
            scale = _FIRST_SCALE * _GROWTH**number
            self._parts.trainer.perturb(scale=scale, seed=seeds.derive(self._recipe.loop.seed, "probe", number))
            self._push()
            square += scale**2
            reached = self._sample("away", batches=1).mean
            if reached >= _FAR_ENOUGH:
                break
        self._scale = square**0.5
        return reached

    def _take_gradient(self, found: _Scored, recipe: Recipe, *, rows: slice = slice(None)) -> float:
        """Leave the gradient of the KL term alone, on some rows, in the trainer; its norm."""
        batch = assemble(found.batch, found.scores, recipe).rows(rows)
        self._parts.trainer.forward_backward(*kl_part(batch, policy_loss(recipe, batch)), keep_whole_gradient=True)
        return _norm(gradient for _, gradient in self._parts.trainer.export_gradients())

    def _gradient(self, found: _Scored) -> _Gradient:
        """At twice beta, then at beta: that one stays in the trainer."""
        kl, trainer = self._recipe.kl, self._parts.trainer
        doubled = self._recipe.model_copy(update={"kl": kl.model_copy(update={"beta": 2 * kl.beta})})
        norm_doubled = self._take_gradient(found, doubled)
        kept = trainer.keep_gradient()
        norm = self._take_gradient(found, self._recipe)
        pairs = zip(trainer.export_gradients(kept), trainer.export_gradients(), strict=True)
        gap = _norm(twice - 2 * once for (_, twice), (_, once) in pairs)
        return _Gradient(norm=norm, norm_doubled=norm_doubled, gap=gap)

    def _slopes(self, found: _Scored, before: _Scored) -> Tensor:
        """``[batches]`` first-order decrease of the exact KL per unit of step along each batch's own gradient.

        The exact KL's gradient is that of the full-vocabulary estimator, from the batches that measure the descent.
        """
        kl, trainer = self._recipe.kl, self._parts.trainer
        exact = KLConfig(
            beta=kl.beta,
            estimator=Estimator.EXACT,
            placement=Placement.BOTH,
            credit=Credit.TO_GO,
            objective=kl.objective,
        )
        self._take_gradient(before, self._recipe.model_copy(update={"kl": exact}))
        steepest = trainer.keep_gradient()
        slopes = []
        for rows in torch.arange(found.full_kl.numel()).chunk(self._batches):
            self._take_gradient(found, self._recipe, rows=slice(int(rows[0]), int(rows[-1]) + 1))
            pairs = zip(trainer.export_gradients(steepest), trainer.export_gradients(), strict=True)
            slopes.append(sum(float((a.double() * b.double()).sum()) for (_, a), (_, b) in pairs) / kl.beta)
        return torch.tensor(slopes, dtype=torch.float64)


def descent_check(before: Tensor, after: Tensor, *, tangent: Tensor, group_size: int) -> Check:
    """Whether the expected gradient lowers the exact KL.

    Args:
        before: ``[B]`` exact KL of sequences sampled before the step, nats, completions of a prompt next to each other.
        after: ``[B]`` of sequences sampled after it, from the same prompts and seeds.
        tangent: ``[batches]`` first-order decrease that the step would bring along each batch's own gradient, nats.
        group_size: completions of each prompt.
    """
    decrease, sampling = paired_decrease(before, after, group_size=group_size)
    of_gradient = float(tangent.double().std() / tangent.numel() ** 0.5)
    error = math.hypot(sampling, of_gradient)
    start, end = float(before.mean()), float(after.mean())
    return Check(
        name="exact KL falls along the negative gradient",
        found=f"{start:.4f} -> {end:.4f} nats, less by {decrease:.4f} +- {error:.4f}",
        wanted=f"less by > {STANDARD_ERRORS:g} standard errors",
        verdict=verdict(decrease > STANDARD_ERRORS * error),
        numbers={
            "before": start,
            "after": end,
            "decrease": decrease,
            "standard_error": error,
            "standard_error_of_sampling": sampling,
            "standard_error_of_gradient": of_gradient,
            "decrease_along_tangent": float(tangent.mean()),
        },
    )


def paired_decrease(before: Tensor, after: Tensor, *, group_size: int) -> tuple[float, float]:
    """Mean decrease and its standard error, with prompts as the independent units.

    Args:
        before: ``[B]`` values, completions of one prompt next to each other.
        after: ``[B]`` values of the same prompts.
        group_size: completions of each prompt.
    """
    per_prompt = (before - after).double().view(-1, group_size).mean(-1)
    return float(per_prompt.mean()), float(per_prompt.std() / per_prompt.numel() ** 0.5)


def _step_size(kl: float, norm: float, *, beta: float) -> float:
    """Length along the gradient of ``beta * KL`` that takes ``STEP_SHARE`` of the KL away, to first order."""
    return STEP_SHARE * kl * beta / norm**2 if norm > 0 else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _kl_at_start(kl: float, tolerance: float) -> Check:
    return Check(
        name="exact KL before any update",
        found=f"{kl:.2e} nats per sequence",
        wanted=f"0, up to {tolerance:g}",
        verdict=verdict(abs(kl) < tolerance),
        numbers={"kl": kl, "tolerance": tolerance},
    )


def _gradient_at_start(norm: float, norm_away: float, kl: KLConfig) -> Check:
    # the log-ratio and its absolute value have a slope at 0: differentiated, they leave noise of mean 0 there
    only_noise = kl.placement is not Placement.REWARD and kl.estimator in (Estimator.K1, Estimator.ABS)
    bound = VANISHED * norm_away
    return Check(
        name="KL gradient before any update",
        found=f"norm {norm:.2e}",
        wanted="0 in expectation; noise here" if only_noise else f"0, up to {bound:.1e}",
        verdict=Verdict.REPORTED if only_noise else verdict(norm <= bound),
        numbers={"norm": norm, "tolerance": math.nan if only_noise else bound},
    )


def _kl_away(kl: float, tolerance: float) -> Check:
    return Check(
        name="exact KL away from the reference",
        found=f"{kl:.4f} nats per sequence",
        wanted=f"> {tolerance:g}",
        verdict=verdict(kl > tolerance),
        numbers={"kl": kl, "tolerance": tolerance},
    )


def _gradient_away(gradient: _Gradient) -> Check:
    return Check(
        name="KL gradient away from the reference",
        found=f"norm {gradient.norm:.2e}",
        wanted="> 0",
        verdict=verdict(0 < gradient.norm < math.inf),
        numbers={"norm": gradient.norm},
    )


def _linear(gradient: _Gradient) -> Check:
    return Check(
        name="linear in beta",
        found=f"|g(2 beta) - 2 g(beta)| is {gradient.nonlinearity:.1e} of |2 g(beta)|",
        wanted=f"<= {LINEARITY_TOLERANCE:g}",
        verdict=verdict(gradient.nonlinearity <= LINEARITY_TOLERANCE),
        numbers={"relative_gap": gradient.nonlinearity, "norm_doubled": gradient.norm_doubled},
    )
