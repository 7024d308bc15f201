"""The importance ratios that a KL configuration corrects with, to be looked at; `kl.surrogate` applies them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klrl.kl.config import Correction, Estimator, KLConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Ratios that count, detached.

    Attributes:
        values: ``[n]`` as they are applied; of tokens, or of sequences with correction ``sequence``.
        truncated_fraction: share of them above ``kl.ratio_max``; 0 without one.
        log_largest: largest one before it is cut, in nats: it may overflow.
    """

    values: Tensor
    truncated_fraction: float
    log_largest: float


@torch.no_grad()
def importance_ratios(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, config: KLConfig) -> Ratios | None:
    """The ratios of ``config.correction``; None with correction ``none`` or where nothing counts.

    Args:
        logprobs: ``[B, T]`` current policy.
        rollout_logprobs: ``[B, T]`` policy that sampled.
        mask: ``[B, T]`` bool.
        config: the run's.
    """
    if config.correction is Correction.NONE or not bool(mask.any()):
        return None
    log_ratios = (logprobs - rollout_logprobs).where(mask, 0.0)
    if config.correction is Correction.SEQUENCE:
        counted = log_ratios.sum(-1)[mask.any(-1)]
    elif config.correction is Correction.PREFIX:
        cumulated = log_ratios.cumsum(-1)
        counted = (cumulated - log_ratios if config.estimator is Estimator.EXACT else cumulated)[mask]
    else:
        counted = log_ratios[mask]
    bound = math.inf if config.ratio_max is None else math.log(config.ratio_max)
    return Ratios(
        values=counted.clamp(max=bound).exp(),
        truncated_fraction=float((counted > bound).float().mean()),
        log_largest=float(counted.max()),
    )
