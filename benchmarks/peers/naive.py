"""What one writes first: log_softmax of everything in float32, left to autograd; also compiled as a whole."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import policy_loss

Step = Callable[[], Answer]


def from_logits(work: Logits, *, compiled: bool = False) -> Step:
    """From logits; ``compiled`` puts log-probabilities and entropy into one torch.compile graph."""
    measures = torch.compile(_measures) if compiled else _measures

    def step() -> Answer:
        with torch.set_grad_enabled(work.train):
            return work.answer(*measures(work.logits, work.labels))

    return step


def from_hidden(work: Hidden, *, compiled: bool = False) -> Step:
    """From hidden states, through all logits at once."""
    measures = torch.compile(_head_measures) if compiled else _head_measures

    def step() -> Answer:
        logprobs, entropy = measures(work.hidden, work.weight, work.labels)
        return work.answer(policy_loss(logprobs, work.targets), logprobs, entropy)

    return step


def _head_measures(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _measures(F.linear(hidden, weight), labels)


def _measures(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    every = F.log_softmax(logits.float(), dim=-1)
    detached = every.detach()
    entropy = -(detached.exp() * detached).sum(-1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy
