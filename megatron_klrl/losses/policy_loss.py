"""What one microbatch adds to the loss of the update."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_klrl.batch import TrainBatch
from megatron_klrl.rl.surrogates import REINFORCE, Separable, Surrogate

__all__ = ["LossSideKL", "PolicyLoss", "Separable", "kl_part", "policy_part"]

LossSideKL = Callable[[Tensor, TrainBatch, Tensor | None], Tensor]
"""``(logprobs, rows, full_kl) -> [B, S]``: the KL's loss side, beta included, differentiable; zero where masked."""

CLIP_FRACTION = "policy/clip_fraction"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A surrogate of the task reward, an entropy bonus, and the KL term summed over tokens and averaged over sequences.

    Minimised. Its gradient, summed over all microbatches and ranks, is in expectation ``-grad E[R]`` (with REINFORCE,
    ``sequence_sum`` aggregation and no bonus) plus whatever the KL configuration's catalogue row states. Neither
    surrogate, aggregation nor mismatch weight touches the KL.

    Attributes:
        num_sequences: sequences of the whole update, over all ranks: the KL's denominator.
        num_tokens: response tokens of the whole update, over all ranks: the metrics' denominator.
        surrogate: of the task reward, bounds filled in.
        entropy_bonus: reward per nat of entropy at a token, weighed like the surrogate's terms.
        loss_side_kl: the loss side of the KL configuration, or None when it has none.
        needs_full_kl: the loss side differentiates the full-vocabulary KL, so the caller must hand it over.
        kl_separable: where the loss side may be cut.
    """

    num_sequences: int
    num_tokens: int
    surrogate: Surrogate = REINFORCE
    entropy_bonus: float = 0.0
    loss_side_kl: LossSideKL | None = None
    needs_full_kl: bool = False
    kl_separable: Separable = Separable.SEQUENCES

    @property
    def needs_entropy(self) -> bool:
        """The loss differentiates the entropy, so the caller must hand it over."""
        return self.entropy_bonus != 0

    @property
    def separable(self) -> Separable:
        """Where an update may be cut: the losses of the pieces, of any shape, add up to the whole one's."""
        parts = [self.surrogate.separable] + ([] if self.loss_side_kl is None else [self.kl_separable])
        return Separable.SEQUENCES if Separable.SEQUENCES in parts else Separable.TOKENS

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a call gives beside the loss; the same on every rank and in every microbatch."""
        return (CLIP_FRACTION,)

    def __call__(
        self, logprobs: Tensor, rows: TrainBatch, *, full_kl: Tensor | None = None, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar this microbatch contributes, and what it contributes to each of `metrics`.

        Args:
            logprobs: ``[B, S]`` current policy, with gradient.
            rows: the microbatch; or any of its tokens where ``separable`` says so.
            full_kl: ``[B, S]`` full-vocabulary KL at each position, with gradient; None unless it is needed.
            entropy: ``[B, S]`` nats, with gradient; None unless it is needed.

        Returns:
            The loss, and detached scalars that add up over microbatches and ranks.

        Raises:
            ValueError: the entropy is needed and missing.
        """
        mask = rows.response_mask
        terms = self.surrogate.terms(logprobs, rows.old_logprobs, advantages=rows.advantages, mask=mask)
        policy = -(rows.token_weights * rows.importance_weights * terms.values).sum()
        if self.needs_entropy:
            policy = policy - self._bonus(rows, entropy)
        kl = -(rows.kl_advantages * logprobs.where(mask, 0.0)).sum()
        if self.loss_side_kl is not None:
            kl = kl + self.loss_side_kl(logprobs, rows, full_kl).sum()
        return policy + kl / self.num_sequences, {CLIP_FRACTION: terms.clipped.sum() / self.num_tokens}

    def _bonus(self, rows: TrainBatch, entropy: Tensor | None) -> Tensor:
        if entropy is None:
            raise ValueError("entropy is missing: the entropy bonus differentiates it, [B, S]")
        return self.entropy_bonus * (rows.token_weights * entropy.where(rows.response_mask, 0.0)).sum()


def policy_part(batch: TrainBatch, loss: PolicyLoss) -> tuple[TrainBatch, PolicyLoss]:
    """The same update without its KL term."""
    return replace(batch, kl_advantages=torch.zeros_like(batch.kl_advantages)), replace(
        loss, loss_side_kl=None, needs_full_kl=False
    )


def kl_part(batch: TrainBatch, loss: PolicyLoss) -> tuple[TrainBatch, PolicyLoss]:
    """The KL term of the same update alone. With ``policy_part`` it adds up to the whole loss, metrics included."""
    return replace(batch, advantages=torch.zeros_like(batch.advantages)), replace(
        loss, surrogate=REINFORCE, entropy_bonus=0.0
    )
