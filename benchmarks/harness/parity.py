"""Is an answer the right one? Every answer is compared with the workload's float64 answer before anything is timed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

_BLOCK = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one call computes.

    Attributes:
        loss: 0-dimensional; None where the work has no loss.
        values: per-token values by name, detached, such as ``entropy``.
        gradients: of the loss with respect to the inputs, by name.
    """

    loss: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: str) -> None:
        """Write it to a file, for the other processes."""
        torch.save({part.name: getattr(self, part.name) for part in fields(self)}, path)

    @staticmethod
    def load(path: str) -> "Answer":
        """Read it back, mapped into memory rather than copied."""
        return Answer(**torch.load(path, mmap=True, weights_only=True))


def differences(answer: Answer, truth: Answer) -> dict[str, float]:
    """How far ``answer`` is from the truth in everything it gives, by name.

    The loss absolutely, per unit of the larger of 1 and the loss; everything else relatively, in Euclidean norm.

    Raises:
        ValueError: the answer lacks a loss or gradient that the truth has, has something that the truth lacks, or
            shapes differ.
    """
    if (answer.loss is None) != (truth.loss is None) or set(answer.gradients) != set(truth.gradients):
        raise ValueError(
            f"gives a loss: {answer.loss is not None}, gradients of {sorted(answer.gradients)}; the truth has "
            f"{truth.loss is not None}, {sorted(truth.gradients)}"
        )
    found = {}
    if answer.loss is not None and truth.loss is not None:
        expected = float(truth.loss.detach())
        found["loss"] = abs(float(answer.loss.detach()) - expected) / max(1.0, abs(expected))
    for kind, given, true in (
        ("values", answer.values, truth.values),
        ("gradients", answer.gradients, truth.gradients),
    ):
        for name, tensor in given.items():
            if name not in true:
                raise ValueError(f"gives {kind} of {name}; the truth has {sorted(true)}")
            found[f"{kind}/{name}"] = _relative(tensor, true[name])
    return found


def _relative(given: Tensor, true: Tensor) -> float:
    """``|given - true| / |true|``, a block at a time: both may be large. NaN where either is not finite."""
    if given.shape != true.shape:
        raise ValueError(f"has shape {tuple(given.shape)} where the truth has {tuple(true.shape)}")
    distance = length = 0.0
    # A gradient written over a leaf is that leaf, which asks for a gradient itself.
    for left, right in zip(given.detach().reshape(-1).split(_BLOCK), true.reshape(-1).split(_BLOCK), strict=True):
        exact = right.to(left.device, torch.float64)
        distance += float((left.double() - exact).square().sum())
        length += float(exact.square().sum())
    if length == 0.0:
        return distance**0.5
    return (distance / length) ** 0.5
