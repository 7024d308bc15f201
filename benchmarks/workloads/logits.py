"""Logits that exist: the loss and its gradient from `[B, T, V]`, whole or cut over the vocabulary."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.policy_loss import PolicyTargets, policy_loss

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BLOCK = 2**25
_SPREAD = 2.5


class Logits:
    """Seeded logits, labels that are likelier than chance, and the loss's targets.

    Attributes:
        logits: ``[B, T, columns]`` this rank's columns, a leaf with gradient unless ``train`` is false.
        labels: ``[B, T]`` int64 indices of the whole vocabulary.
        targets: of the loss.
        vocab: size of the whole vocabulary.
        start: vocabulary index of the first column here.
        train: whether the work includes loss and backward; else it is log-probabilities and entropy alone.
    """

    def __init__(
        self, *, batch: int, tokens: int, vocab: int, dtype: str, device: str = "cpu", train: bool = True, seed: int = 0
    ) -> None:
        """Make the inputs; the same for the same arguments on the same kind of device, on every rank."""
        generator = torch.Generator(device).manual_seed(seed)
        full = torch.empty(batch, tokens, vocab, dtype=_DTYPES[dtype], device=device)
        full.normal_(generator=generator).mul_(_SPREAD)
        self.labels = torch.randint(vocab, (batch, tokens), generator=generator, device=device)
        bonus = torch.empty(batch, tokens, 1, device=device).uniform_(4, 14, generator=generator).to(full.dtype)
        full.scatter_add_(-1, self.labels.unsqueeze(-1), bonus)
        self.vocab, self.train = vocab, train
        self.targets = PolicyTargets.near(self._logprobs(full), generator)
        columns = vocab // dist.get_world_size()
        self.start = dist.get_rank() * columns
        self._full = full
        self._pristine = full[..., self.start : self.start + columns]
        self.logits = self._pristine.clone(memory_format=torch.contiguous_format).requires_grad_(train)

    def restore(self) -> None:
        """Undo what a contestant wrote over the logits."""
        with torch.no_grad():
            self.logits.copy_(self._pristine)

    def leave_room(self, positions: int) -> None:
        """Put the logits into a buffer with more positions per sequence, for a peer that wants them so.

        Afterwards ``logits`` is ``buffer[:, :T]`` and a leaf of its own is not kept; ``buffer`` is what the peer gets.
        """
        batch, tokens, columns = self.logits.shape
        self.buffer = torch.zeros(
            batch, tokens + positions, columns, dtype=self.logits.dtype, device=self.logits.device
        ).requires_grad_(self.train)
        self.logits = self.buffer.detach()[:, :tokens]
        self.restore()

    def size(self) -> Mapping[str, float]:
        """Reading the logits in the forward and again in the backward, and writing the gradient: three passes."""
        size = self.logits.numel() * self.logits.element_size()
        return {"input_bytes": size, "least_bytes": (3 if self.train else 1) * size, "least_flops": 0}

    def truth(self) -> Answer:
        """In float64, a block of tokens at a time; the gradient of this rank's columns."""
        logprobs, entropy = self._logprobs(self._full), self._entropy()
        values = {"logprobs": logprobs, "entropy": entropy}
        if not self.train:
            return Answer(values=values)
        leaf = logprobs.clone().requires_grad_()
        loss = policy_loss(leaf, self.targets)
        (upstream,) = torch.autograd.grad(loss, leaf)
        columns = self.logits.shape[-1]
        gradient = torch.empty(self.logits.shape, dtype=torch.float32, device=self.logits.device).view(-1, columns)
        flat = self._full.view(-1, self.vocab)
        here = slice(self.start, self.start + columns)
        for rows in self._blocks():
            slope = upstream.view(-1, 1)[rows]
            local = torch.softmax(flat[rows].double(), -1).mul_(-slope)
            local.scatter_add_(-1, self.labels.view(-1, 1)[rows], slope)
            gradient[rows] = local[:, here].float()
        return Answer(loss=loss.detach(), values=values, gradients={"logits": gradient.view(self.logits.shape)})

    def answer(self, logprobs: Tensor, entropy: Tensor | None) -> Answer:
        """Loss and backward from ``[B, T]`` log-probabilities, or they alone where nothing is trained.

        The entropy is for the log, as in a trainer without an entropy bonus: it carries no gradient.
        """
        known = {"logprobs": logprobs.detach()} | ({} if entropy is None else {"entropy": entropy.detach()})
        if not self.train:
            return Answer(values=known)
        loss = policy_loss(logprobs, self.targets)
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return Answer(loss=loss.detach(), values=known, gradients={"logits": gradient})

    def _blocks(self) -> Iterator[slice]:
        rows = self.labels.numel()
        step = max(1, _BLOCK // self.vocab)
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def _logprobs(self, full: Tensor) -> Tensor:
        """``[B, T]`` float64."""
        found = torch.empty(self.labels.numel(), dtype=torch.float64, device=full.device)
        flat, labels = full.view(-1, full.shape[-1]), self.labels.view(-1, 1)
        for rows in self._blocks():
            block = flat[rows].double()
            found[rows] = block.gather(-1, labels[rows]).squeeze(-1) - block.logsumexp(-1)
        return found.view(self.labels.shape)

    def _entropy(self) -> Tensor:
        found = torch.empty(self.labels.numel(), dtype=torch.float64, device=self._full.device)
        flat = self._full.view(-1, self.vocab)
        for rows in self._blocks():
            every = torch.log_softmax(flat[rows].double(), -1)
            found[rows] = -(every.exp() * every).sum(-1)
        return found.view(self.labels.shape)
