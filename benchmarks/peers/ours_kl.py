"""This project: the KL term."""

from collections.abc import Callable

from benchmarks.harness.parity import Answer
from benchmarks.workloads.kl_terms import KLTerms
from megatron_klrl.kl.surrogate import kl_surrogate

Step = Callable[[], Answer]


def kl_term(work: KLTerms) -> Step:
    """``kl_surrogate`` with its checks, as the trainer calls it."""

    def step() -> Answer:
        loss = kl_surrogate(
            work.logprobs,
            work.ref_logprobs,
            work.mask,
            config=work.config,
            rollout_logprobs=work.rollout_logprobs,
            full_kl=work.full_kl,
        )
        return work.answer(loss.mean())

    return step
