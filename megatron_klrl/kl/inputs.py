"""What enters the KL term: checked, masked, and in the precision it is computed in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.kl.config import CLAMPABLE, Correction, Estimator, KLConfig
from megatron_klrl.kl.estimators import (
    SAMPLED_ESTIMATORS,
    linear_tail,
    require_finite,
    require_representable,
    working_dtype,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """Masked inputs of one batch, ``[B, T]``, float32 or float64.

    Attributes:
        logprobs: current policy, with its gradient; zero where masked.
        ref_logprobs: frozen reference, detached; zero where masked.
        rollout_logprobs: policy that sampled, detached; zero where masked; the current one's unless others are given.
        full_kl: per-position full-vocabulary KL, zero where masked; None unless the estimator is ``exact``.
        mask: bool.
        log_ratio_clamp: bound on the log-ratio of k2 and k3, nats; None for none.
        ratio_max: largest importance ratio; None for no bound.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    full_kl: Tensor | None
    mask: Tensor
    log_ratio_clamp: float | None
    ratio_max: float | None

    @property
    def policy_log_ratio(self) -> Tensor:
        """``[B, T]`` log pi/mu with the gradient of pi; zero where masked."""
        return self.logprobs - self.rollout_logprobs

    def estimates(self, estimator: Estimator) -> Tensor:
        """``[B, T]`` nats per token, differentiable, zero where masked."""
        if estimator is Estimator.EXACT:
            assert self.full_kl is not None  # read_inputs refuses exact without it
            return self.full_kl
        if self.log_ratio_clamp is not None and estimator in CLAMPABLE:
            return linear_tail(
                self.logprobs, self.ref_logprobs, self.mask, estimator=estimator, bound=self.log_ratio_clamp
            ).values
        return SAMPLED_ESTIMATORS[estimator](self.logprobs, self.ref_logprobs)

    def token_ratios(self) -> Tensor:
        """``[B, T]`` rho_t = pi/mu, differentiable."""
        return self._ratios(self.policy_log_ratio, what="importance ratio of a token")

    def prefix_ratios(self, estimator: Estimator) -> Tensor:
        """``[B, T]`` product of the token ratios up to a token; without its own for ``exact``, which needs no token."""
        log_ratio = self.policy_log_ratio
        cumulated = log_ratio.cumsum(-1)
        if estimator is Estimator.EXACT:
            cumulated = cumulated - log_ratio
        return self._ratios(cumulated, what="importance ratio of a prefix")

    def sequence_ratios(self) -> Tensor:
        """``[B, 1]`` product of a sequence's token ratios."""
        return self._ratios(self.policy_log_ratio.sum(-1, keepdim=True), what="importance ratio of a sequence")

    def _ratios(self, log_ratios: Tensor, *, what: str) -> Tensor:
        """Cut in the exponent, where nothing overflows. What is cut keeps its direction: value and gradient shrink by
        one factor, as if the term had this weight.
        """
        if self.ratio_max is not None:
            excess = (log_ratios.detach() - math.log(self.ratio_max)).clamp(min=0.0)
            return (log_ratios - excess).exp()
        ratios = log_ratios.exp()
        require_representable(ratios, lambda: log_ratios, what=what)
        return ratios


def read_inputs(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    config: KLConfig,
    rollout_logprobs: Tensor | None,
    full_kl: Tensor | None,
) -> TokenInputs:
    """Checks and prepares what the KL term of ``config`` uses; the rest is not looked at.

    Raises:
        ValueError: a shape, the mask's type or a missing ``full_kl``; or a value that counts is not finite.
    """
    corrected = config.correction is not Correction.NONE and rollout_logprobs is not None
    exact = config.estimator is Estimator.EXACT
    used = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    if corrected and rollout_logprobs is not None:
        used["rollout_logprobs"] = rollout_logprobs
    if exact:
        if full_kl is None:
            raise ValueError("full_kl is missing: estimator 'exact' needs the per-position full-vocabulary KL, [B, T]")
        used["full_kl"] = full_kl
    _check_shapes(used, mask)
    dtype = working_dtype(*used.values())
    masked = {name: torch.where(mask, tensor, 0.0).to(dtype) for name, tensor in used.items()}
    require_finite(masked)
    return TokenInputs(
        logprobs=masked["logprobs"],
        ref_logprobs=masked["ref_logprobs"].detach(),
        rollout_logprobs=masked.get("rollout_logprobs", masked["logprobs"]).detach(),
        full_kl=masked.get("full_kl"),
        mask=mask,
        log_ratio_clamp=config.log_ratio_clamp,
        ratio_max=config.ratio_max,
    )


def _check_shapes(tensors: dict[str, Tensor], mask: Tensor) -> None:
    shape = tensors["logprobs"].shape
    if len(shape) != 2:
        raise ValueError(f"logprobs must be [B, T], has shape {tuple(shape)}")
    for name, tensor in {**tensors, "mask": mask}.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(shape)}; they must be equal")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, is {tensor.dtype}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, is {mask.dtype}; pass mask.bool()")
