"""What one microbatch adds to the loss of the update."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_klrl.batch import TrainBatch

LossSideKL = Callable[[Tensor, TrainBatch, Tensor | None], Tensor]
"""``(logprobs, rows, full_kl) -> [B, S]``: the KL's loss side, beta included, differentiable; zero where masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """REINFORCE on the task reward, plus the KL term summed over tokens and averaged over the update's sequences.

    Minimised. Its gradient, summed over all microbatches and ranks, is in expectation
    ``-grad E[R]`` (with ``sequence_sum`` aggregation) plus whatever the KL configuration's catalogue row states.

    Attributes:
        num_sequences: sequences of the whole update, over all ranks: the KL's denominator.
        loss_side_kl: the loss side of the KL configuration, or None when it has none.
        needs_full_kl: the loss side differentiates the full-vocabulary KL, so the caller must hand it over.
    """

    num_sequences: int
    loss_side_kl: LossSideKL | None = None
    needs_full_kl: bool = False

    def __call__(self, logprobs: Tensor, rows: TrainBatch, *, full_kl: Tensor | None = None) -> Tensor:
        """The scalar this microbatch contributes.

        Args:
            logprobs: ``[B, S]`` current policy, with gradient.
            rows: the microbatch.
            full_kl: ``[B, S]`` full-vocabulary KL at each position, with gradient; None unless it is needed.
        """
        mask = rows.response_mask
        taken = logprobs.where(mask, 0.0)
        policy = -(rows.token_weights * rows.advantages * taken).sum()
        kl = -(rows.kl_advantages * taken).sum()
        if self.loss_side_kl is not None:
            kl = kl + self.loss_side_kl(logprobs, rows, full_kl).sum()
        return policy + kl / self.num_sequences


def policy_part(batch: TrainBatch, loss: PolicyLoss) -> tuple[TrainBatch, PolicyLoss]:
    """The same update without its KL term."""
    return replace(batch, kl_advantages=torch.zeros_like(batch.kl_advantages)), replace(
        loss, loss_side_kl=None, needs_full_kl=False
    )


def kl_part(batch: TrainBatch, loss: PolicyLoss) -> tuple[TrainBatch, PolicyLoss]:
    """The KL term of the same update alone. With ``policy_part`` it adds up to the whole loss."""
    return replace(batch, advantages=torch.zeros_like(batch.advantages)), loss
