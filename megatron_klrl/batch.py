"""The tensors of one step: what was sampled, and what the trainer says of it.

Rows are whole sequences (prompt, then response), padded on the right. Tensors of shape ``[B, S]`` are aligned with
*targets*: position ``t`` belongs to ``tokens[:, t + 1]``, so ``S = tokens.shape[1] - 1``.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


class _Rows:
    """Row selection shared by the batch types: every tensor field has the batch as its first dimension."""

    def rows(self, index: Tensor | slice) -> Self:
        """The same batch, restricted to some rows."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{n: t[index] for n, t in tensors.items() if isinstance(t, Tensor)})  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(_Rows):
    """Completions of one step as tensors, siblings of one prompt next to each other.

    Attributes:
        tokens: ``[B, S + 1]`` int64 token ids, prompt then response then padding.
        response_mask: ``[B, S]`` bool, true where the target was sampled (end-of-sequence token included).
        rollout_logprobs: ``[B, S]`` float32 nats, log-probability the engine sampled the target with; 0 elsewhere.
        rewards: ``[B]`` float32, of the task alone.
        truncated: ``[B]`` bool, whether the response was cut off at its longest.
        weight_version: ``[B]`` int64, the version of the weights that sampled the row.
    """

    tokens: Tensor
    response_mask: Tensor
    rollout_logprobs: Tensor
    rewards: Tensor
    truncated: Tensor
    weight_version: Tensor

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int64 number of response tokens."""
        return self.response_mask.sum(-1)


@dataclass(frozen=True, kw_only=True)
class TokenScores(_Rows):
    """What the trainer's forward passes say of a batch, before the update.

    All ``[B, S]`` float32, zero outside the response.

    Attributes:
        old_logprobs: the policy before this update, trainer's own recompute.
        entropy: entropy of the policy at each position, nats.
        ref_logprobs: the frozen reference; None when no reference is loaded.
        full_kl: full-vocabulary KL(policy || reference) at each position, nats; None without a reference.
    """

    old_logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    full_kl: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TrainBatch(_Rows):
    """One update's data: what the policy loss needs, besides the current log-probabilities.

    Attributes:
        tokens: ``[B, S + 1]`` int64.
        response_mask: ``[B, S]`` bool.
        advantages: ``[B, S]`` float32 advantage of the task reward; never holds a KL.
        token_weights: ``[B, S]`` float32 weight of each token's policy-gradient term in the global loss.
        old_logprobs: ``[B, S]`` float32 nats, the policy before the update: what the surrogate's ratios are taken to.
        importance_weights: ``[B, S]`` float32 factor of the policy-gradient term alone, which corrects for the gap
            between trainer and engine; ones outside a correction.
        kl_advantages: ``[B, S]`` float32 minus beta times the reward side of the KL, baseline included.
        ref_logprobs: ``[B, S]`` float32; None when no reference is loaded.
        rollout_logprobs: ``[B, S]`` float32.
    """

    tokens: Tensor
    response_mask: Tensor
    advantages: Tensor
    token_weights: Tensor
    old_logprobs: Tensor
    importance_weights: Tensor
    kl_advantages: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor

    def at(self, places: Tensor) -> Self:
        """One row ``[1, n]`` of single targets, for losses that are sums over tokens.

        Args:
            places: ``[n]`` into the flattened targets ``[B * S]``.
        """
        targets = torch.nn.functional.pad(self.tokens[:, 1:].flatten()[places], (1, 0))
        picked = {
            f.name: value.flatten()[places].unsqueeze(0)
            for f in fields(self)
            if f.name != "tokens" and isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, tokens=targets.unsqueeze(0), **picked)

    @property
    def num_rows(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]


def padding_rows(batch: TrainBatch | RolloutBatch, count: int) -> Tensor:
    """Index that appends ``count`` copies of the first row, to fill a microbatch; the caller blanks their masks."""
    rows = batch.tokens.shape[0]
    return torch.cat([torch.arange(rows), torch.zeros(count, dtype=torch.long)])
