"""The two passes over logits as plain functions, from which :mod:`compiled` generates kernels.

The same numbers as :mod:`eager`, which has the docstrings; here a pass is written for a compiler that fuses it.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def partition(logits: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """``(log_z,)`` of ``[n, size]`` logits."""
    x = logits.float() * scale
    top = x.amax(-1, keepdim=True)
    return ((x - top).exp().sum(-1).log() + top.squeeze(-1),)


def partition_entropy(logits: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """``(log_z, entropy)``."""
    x = logits.float() * scale
    top = x.amax(-1, keepdim=True)
    below = x - top
    mass = below.exp()
    total = mass.sum(-1)
    log_total = total.log()
    return log_total + top.squeeze(-1), log_total - (mass * below).sum(-1) / total


def compare(
    logits: Tensor, ref_logits: Tensor, log_z: Tensor, ref_log_z: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``(gap, full_kl)`` of ``[n, size]`` logits and reference logits with their ``[n, 1]`` log Z."""
    x, y = logits.float() * scale, ref_logits.float() * scale
    offset = log_z - ref_log_z
    log_ratio = (x - y) - offset
    p = (x - log_z).exp()
    return (p * log_ratio).sum(-1) + offset.squeeze(-1), divergence(p, (y - ref_log_z).exp(), log_ratio).sum(-1)


def divergence(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Terms of KL(p || q) that are never negative: ``p log_ratio + q - p``, whose sum is the KL as p and q sum to one.

    With ``log_ratio = log p - log q`` a term is ``p (expm1(-log_ratio) + log_ratio)``, of second order in the ratio:
    nothing cancels between the terms, and an error e in the normalisation, common to all of them, adds e**2 / 2 alone.
    Where q > e p the exponential is held at its value for q = e p, lest it overflow, and what is then missing is added
    without one.
    """
    near = p * (torch.expm1((-log_ratio).clamp(max=1.0)) + log_ratio)
    return near + torch.relu(q - math.e * p)


def gradient(out: Tensor, logits: Tensor, log_z: Tensor, scale: Tensor, constant: Tensor) -> tuple[Tensor, ...]:
    """Write ``p constant``."""
    out.copy_((logits.float() * scale - log_z).exp() * constant)
    return ()


def gradient_slope(
    out: Tensor, logits: Tensor, log_z: Tensor, scale: Tensor, constant: Tensor, slope: Tensor
) -> tuple[Tensor, ...]:
    """Write ``p (constant + slope x)``."""
    x = logits.float() * scale
    out.copy_((x - log_z).exp() * (constant + slope * x))
    return ()


def gradient_tilt(
    out: Tensor,
    logits: Tensor,
    log_z: Tensor,
    scale: Tensor,
    constant: Tensor,
    slope: Tensor,
    ref_logits: Tensor,
    tilt: Tensor,
) -> tuple[Tensor, ...]:
    """Write ``p (constant + slope x + tilt (x - y))``."""
    x, y = logits.float() * scale, ref_logits.float() * scale
    out.copy_((x - log_z).exp() * (constant + slope * x + tilt * (x - y)))
    return ()


@functools.cache
def in_place(body: Callable) -> Callable:
    """The gradient ``body`` that writes over the logits, which are its first argument."""

    def over_logits(logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return body(logits, logits, *others)

    over_logits.__name__ = f"{body.__name__}_in_place"
    return over_logits
