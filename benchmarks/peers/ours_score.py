"""This project: the trainer's log-probabilities of tokens that exist."""

from collections.abc import Callable

from benchmarks.harness.parity import Answer
from benchmarks.peers.ours_step import batching, rollouts, trainer
from benchmarks.workloads.replay import Replay
from megatron_klrl.config.recipe import Fp8
from megatron_klrl.mcore.precision import Products

Step = Callable[[], Answer]


def score(work: Replay, *, packed: bool, layers: str | None = None, fp8: str = "none") -> Step:
    """What the trainer says of the completions before an update.

    Args:
        work: the rows.
        packed: one after the other instead of padded.
        layers: ``local`` or ``fused``; None takes what the device runs quickest.
        fp8: scaling of 8-bit products.
    """
    batch = rollouts(work)
    products = Products(fp8=Fp8(fp8))
    rows = batching(work, packed=packed, multiple=products.token_multiple)
    engine = trainer(work, rows=rows, layers=layers, products=products)

    def step() -> Answer:
        return work.scored(engine.score(batch).old_logprobs[batch.response_mask])

    return step
