"""TRL: the function that scores logits, and the chunked head that its GRPO trainer patches into the model."""

from collections.abc import Callable

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax_and_entropy

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import policy_loss

Step = Callable[[], Answer]
# The trainers' own setting, a private constant of trl.trainer.utils.
_CHUNK_COLUMNS = 32768


def from_logits(work: Logits, *, torch_path: bool = False) -> Step:
    """``selective_log_softmax_and_entropy``: a Triton kernel on a GPU, torch functions elsewhere.

    With ``torch_path`` logits get a fourth dimension, which the Triton kernel does not take, so that a GPU runs the
    torch functions too.
    """

    def step() -> Answer:
        logits, labels = (
            (work.logits.unsqueeze(1), work.labels.unsqueeze(1)) if torch_path else (work.logits, work.labels)
        )
        with torch.set_grad_enabled(work.train):
            logprobs, entropy = selective_log_softmax_and_entropy(logits, labels, entropy_requires_grad=False)
            return work.answer(logprobs.view(work.labels.shape), entropy.view(work.labels.shape))

    return step


def from_hidden(work: Hidden) -> Step:
    """``ChunkedLogProbFunction`` with the outputs and the chunk of the GRPO trainer."""

    def step() -> Answer:
        hidden = work.hidden.reshape(-1, work.hidden.shape[-1])
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, work.weight, None, work.labels.view(-1), 1.0, _CHUNK_COLUMNS, None, 1.0, ("log_probs", "entropy")
        )
        logprobs, entropy = logprobs.view(work.labels.shape), entropy.view(work.labels.shape)
        return work.answer(policy_loss(logprobs, work.targets), logprobs, entropy)

    return step
