"""verl: log-probabilities and entropy from logits, its fused heads, and its KL penalty."""

from collections.abc import Callable

import torch
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.kl_terms import KLTerms
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import policy_loss
from megatron_klrl.kl.config import Placement

Step = Callable[[], Answer]


def from_logits(work: Logits, *, compiled_entropy: bool = False) -> Step:
    """The two functions that its engines call; these compile the entropy unless told not to.

    The engines first copy the logits, divided by the temperature, and may hand over one row per token, which makes the
    loop in ``logprobs_from_logits`` as long as the batch has tokens; neither is done here.
    """
    entropy_of = torch.compile(entropy_from_logits, dynamic=True) if compiled_entropy else entropy_from_logits

    def step() -> Answer:
        with torch.set_grad_enabled(work.train):
            logprobs = logprobs_from_logits(work.logits, work.labels, inplace_backward=False)
            with torch.no_grad():
                entropy = entropy_of(work.logits)
            return work.answer(logprobs, entropy)

    return step


def from_hidden(work: Hidden, *, chunk_tokens: int = 512) -> Step:
    """``FusedLinearForPPO``, its torch form; 512 tokens a chunk is its own setting."""
    head = FusedLinearForPPO(chunk_size=chunk_tokens)

    def step() -> Answer:
        logprobs, entropy = head(work.hidden, work.weight, work.labels)
        return work.answer(policy_loss(logprobs, work.targets), logprobs, entropy)

    return step


def kl_term(work: KLTerms) -> Step:
    """``kl_penalty`` of one token: differentiated in the loss, or detached and multiplied by the log-probability."""
    kind = str(work.config.estimator)

    def step() -> Answer:
        with torch.set_grad_enabled(work.config.placement is Placement.LOSS):
            penalty = kl_penalty(work.logprobs, work.ref_logprobs, kind)
        term = penalty if work.config.placement is Placement.LOSS else penalty * work.logprobs
        return work.answer(work.config.beta * (term * work.mask).sum(-1).mean())

    return step
