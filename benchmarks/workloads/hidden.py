"""Hidden states and a head: the loss and its gradients with respect to both, the logits being nobody's input."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.policy_loss import PolicyTargets, policy_loss

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BLOCK = 2**25
_SPREAD = 2.5


class Hidden:
    """Seeded hidden states ``[B, T, H]`` and head ``[V, H]``, both with gradient, labels and targets.

    Attributes:
        hidden: ``[B, T, H]`` leaf.
        weight: ``[V, H]`` leaf.
        labels: ``[B, T]`` int64.
        targets: of the loss.
    """

    def __init__(
        self, *, batch: int, tokens: int, width: int, vocab: int, dtype: str, device: str = "cpu", seed: int = 0
    ) -> None:
        """Make the inputs. The logits spread by about 2.5, and the labels are likelier than chance."""
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.empty(vocab, width, device=device).normal_(generator=generator).mul_(_SPREAD / width**0.5)
        hidden = torch.empty(batch, tokens, width, device=device).normal_(generator=generator)
        self.labels = torch.randint(vocab, (batch, tokens), generator=generator, device=device)
        pull = torch.empty(batch, tokens, 1, device=device).uniform_(0.5, 2.0, generator=generator)
        hidden.addcmul_(pull, weight[self.labels])
        self.hidden = hidden.to(_DTYPES[dtype]).requires_grad_()
        self.weight = weight.to(_DTYPES[dtype]).requires_grad_()
        with torch.no_grad():
            # float32 is exact enough for targets and, on CPU, half the time of float64 in every process.
            self.targets = PolicyTargets.near(self._measures(torch.float32)[0], generator)

    def restore(self) -> None:
        """Nothing is written over."""

    def size(self) -> Mapping[str, float]:
        """What must exist in the end is the gradient of the head; three products, and the head read in each."""
        tokens, head = self.labels.numel(), self.weight.numel()
        return {
            "input_bytes": head * self.weight.element_size(),
            "least_bytes": 3 * head * self.weight.element_size(),
            "least_flops": 3 * 2 * tokens * head,
        }

    def truth(self) -> Answer:
        """In float64, a block of tokens at a time."""
        with torch.no_grad():
            logprobs, entropy = self._measures(torch.float64)
        leaf = logprobs.clone().requires_grad_()
        loss = policy_loss(leaf, self.targets)
        (upstream,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            hidden, weight = self._gradients(upstream.view(-1, 1))
        return Answer(
            loss=loss.detach(),
            values={"logprobs": logprobs, "entropy": entropy},
            gradients={"hidden": hidden.view(self.hidden.shape), "weight": weight},
        )

    def answer(self, loss: Tensor, logprobs: Tensor | None, entropy: Tensor | None) -> Answer:
        """The backward from the loss to both inputs; values that a contestant does not give are None."""
        gradients = torch.autograd.grad(loss, (self.hidden, self.weight))
        known = {"logprobs": logprobs, "entropy": entropy}
        return Answer(
            loss=loss.detach(),
            values={name: value.detach() for name, value in known.items() if value is not None},
            gradients=dict(zip(("hidden", "weight"), gradients, strict=True)),
        )

    def _blocks(self) -> Iterator[slice]:
        rows = self.labels.numel()
        step = max(1, _BLOCK // len(self.weight))
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def _measures(self, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[B, T]`` log-probabilities and entropies."""
        head, flat = self.weight.to(precision), self.hidden.reshape(-1, self.hidden.shape[-1])
        labels = self.labels.view(-1, 1)
        logprobs = torch.empty(len(flat), dtype=precision, device=flat.device)
        entropy = torch.empty_like(logprobs)
        for rows in self._blocks():
            every = torch.log_softmax(flat[rows].to(precision) @ head.T, -1)
            logprobs[rows] = every.gather(-1, labels[rows]).squeeze(-1)
            entropy[rows] = -(every.exp() * every).sum(-1)
        return logprobs.view(self.labels.shape), entropy.view(self.labels.shape)

    def _gradients(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        head, flat = self.weight.double(), self.hidden.reshape(-1, self.hidden.shape[-1]).double()
        labels = self.labels.view(-1, 1)
        hidden, weight = torch.empty_like(flat), torch.zeros_like(head)
        for rows in self._blocks():
            local = torch.softmax(flat[rows] @ head.T, -1).mul_(-upstream[rows])
            local.scatter_add_(-1, labels[rows], upstream[rows])
            hidden[rows] = local @ head
            weight.addmm_(local.T, flat[rows])
        return hidden.float(), weight.float()
