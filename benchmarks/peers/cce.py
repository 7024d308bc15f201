"""Cut cross entropy: per-token losses from hidden states, compiled torch on CPU, Triton on a GPU; no entropy."""

from collections.abc import Callable

from cut_cross_entropy import linear_cross_entropy

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.policy_loss import policy_loss

Step = Callable[[], Answer]


def from_hidden(work: Hidden, *, implementation: str) -> Step:
    """``linear_cross_entropy`` with ``cce`` or ``torch_compile``; nothing is filtered from the gradient."""

    def step() -> Answer:
        losses = linear_cross_entropy(
            work.hidden, work.weight, work.labels, reduction="none", filter_eps=None, impl=implementation
        )
        logprobs = -losses.float()
        return work.answer(policy_loss(logprobs, work.targets), logprobs, None)

    return step
