"""The same measures and gradients by torch's own autograd in float64, and a record of what is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_klrl.vocab_parallel.measures import TokenMeasures

MEASURES = ("logprobs", "entropy", "full_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """In float64; ``ref_logprobs`` and ``full_kl`` of the reference's logits."""

    logprobs: Tensor
    entropy: Tensor
    full_kl: Tensor
    ref_logprobs: Tensor


def expected(logits: Tensor, ref_logits: Tensor, labels: Tensor, *, temperature: float) -> Expected:
    """Differentiable in ``logits``, which are float64."""
    p = torch.log_softmax(logits / temperature, -1)
    q = torch.log_softmax(ref_logits / temperature, -1)
    at = labels.unsqueeze(-1)
    return Expected(
        logprobs=p.gather(-1, at).squeeze(-1),
        entropy=-(p.exp() * p).sum(-1),
        full_kl=(p.exp() * (p - q)).sum(-1),
        ref_logprobs=q.gather(-1, at).squeeze(-1),
    )


def weighted(found: TokenMeasures | Expected, upstream: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to the measures is ``upstream``."""
    return sum((getattr(found, name) * weight.to(found.logprobs.dtype)).sum() for name, weight in upstream.items())  # type: ignore[return-value]


class Allocations(TorchDispatchMode):
    """Operations that were run, and the bytes of every tensor that came with memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.operations: list[str] = []
        self.inner_sizes: list[int] = []  # of every matrix product, the dimension that is summed over

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _storage(leaf) not in known]
        self.sizes += [leaf.untyped_storage().nbytes() for leaf in fresh]
        self.operations.append(str(func))
        if str(func).startswith(("aten.mm.", "aten.addmm")):
            self.inner_sizes.append(args[-1].shape[0])
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
