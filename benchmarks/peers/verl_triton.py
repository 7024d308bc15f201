"""verl's Triton head, which needs a GPU to import its kernels."""

from collections.abc import Callable

from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.policy_loss import policy_loss

Step = Callable[[], Answer]


def from_hidden(work: Hidden) -> Step:
    """``linear_cross_entropy``: log-probabilities and entropy, logits never stored."""

    def step() -> Answer:
        hidden = work.hidden.reshape(-1, work.hidden.shape[-1])
        logprobs, entropy = linear_cross_entropy(hidden, work.weight, work.labels.view(-1), 1.0, "none")
        logprobs, entropy = logprobs.view(work.labels.shape), entropy.view(work.labels.shape)
        return work.answer(policy_loss(logprobs, work.targets), logprobs, entropy)

    return step
