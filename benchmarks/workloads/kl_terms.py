"""Log-probabilities of sampled tokens: the KL term of one catalogue configuration, forward and backward."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness.parity import Answer
from megatron_klrl.kl.catalogue import catalogue
from megatron_klrl.kl.config import Estimator, KLConfig
from megatron_klrl.kl.surrogate import kl_surrogate

BETA = 0.05


class KLTerms:
    """Seeded ``[B, T]`` log-probabilities under policy, reference and rollout policy, and a response mask.

    Attributes:
        config: the configuration.
        logprobs: leaf.
        full_kl: leaf where the estimator is ``exact``, else None.
        ref_logprobs: within the clamps that peers have, so that these do nothing.
        rollout_logprobs: close to the policy's.
        mask: bool, true up to a length of its own in every row.
    """

    def __init__(self, *, batch: int, tokens: int, configuration: str, seed: int = 0) -> None:
        """Make the inputs of the catalogue entry named ``placement/estimator/credit/correction``."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, tokens)
        axes = next(entry.config.axes for entry in catalogue() if entry.name == configuration)
        self.config = KLConfig(beta=BETA).with_axes(axes)
        logprobs = -2 * torch.randn(shape, generator=generator).abs()
        self.ref_logprobs = logprobs + 0.3 * torch.randn(shape, generator=generator)
        self.rollout_logprobs = logprobs + 0.02 * torch.randn(shape, generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths
        self.logprobs = logprobs.requires_grad_()
        exact = self.config.estimator is Estimator.EXACT
        self.full_kl = torch.rand(shape, generator=generator).requires_grad_() if exact else None

    def restore(self) -> None:
        """Nothing is written over."""

    def size(self) -> Mapping[str, float]:
        """Three tensors read and one gradient written."""
        size = self.logprobs.numel() * self.logprobs.element_size()
        return {"input_bytes": size, "least_bytes": 4 * size, "least_flops": 0}

    def truth(self) -> Answer:
        """Our own function in float64; that it is the right one is what `klrl audit` shows by enumeration."""
        logprobs = self.logprobs.detach().double().requires_grad_()
        full_kl = None if self.full_kl is None else self.full_kl.detach().double().requires_grad_()
        loss = kl_surrogate(
            logprobs,
            self.ref_logprobs.double(),
            self.mask,
            config=self.config,
            rollout_logprobs=self.rollout_logprobs.double(),
            full_kl=full_kl,
        ).mean()
        return answered(loss, logprobs, full_kl)

    def answer(self, loss: Tensor) -> Answer:
        """The backward from the loss."""
        return answered(loss, self.logprobs, self.full_kl)


def answered(loss: Tensor, logprobs: Tensor, full_kl: Tensor | None) -> Answer:
    """Gradients with respect to what the term depends on; zero where it does not."""
    leaves = {"logprobs": logprobs} | ({} if full_kl is None else {"full_kl": full_kl})
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return Answer(loss=loss.detach(), gradients=gradients)
