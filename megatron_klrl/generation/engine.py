"""What the loop needs of a generation engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from torch import Tensor

from megatron_klrl.generation.refit import RefitReport

Ticket = str
"""Names a submitted request until it is answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion wanted.

    Attributes:
        prompt_ids: token ids of the prompt.
        seed: of this request alone, so that the result depends neither on batching nor on the process's generators.
    """

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    The distribution of a token is built in this order: logits over ``temperature``; of those the ``top_k`` largest
    (more where the last one ties); softmax; of that the fewest most probable tokens that together reach ``top_p``;
    renormalised.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        max_tokens: longest response.
        stop_ids: tokens that end a response and belong to it; no other token does.
        top_p: probability that the kept tokens reach together; 1 keeps all.
        top_k: number of tokens kept; None keeps all.
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response.

    Attributes:
        token_ids: sampled tokens, the stop token included.
        logprobs: per token, natural log of the probability it was drawn with: of the distribution that ``Sampling``
            describes, renormalisation included. At temperature 0, where nothing is drawn, of the softmax of the logits.
        finish_reason: "stop" when a stop token was drawn, "length" when ``max_tokens`` or the context ended it,
            "aborted" when the caller did.
        weight_version: of the weights that sampled the first token (of a response without tokens: that would have).
        weight_updates: (position, version) of every weight update in the middle of the response: from that position on,
            tokens were drawn from that version. Empty unless weights are updated while requests are open.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "aborted"]
    weight_version: int
    weight_updates: tuple[tuple[int, int], ...] = ()

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Per token, the version of the weights that sampled it."""
        starts = ((0, self.weight_version), *self.weight_updates)
        ends = (*(start for start, _ in self.weight_updates), len(self.token_ids))
        return tuple(version for (start, version), end in zip(starts, ends, strict=True) for _ in range(end - start))


class Memory(StrEnum):
    """What an engine can give back between rollouts."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


class GenerationEngine(Protocol):
    """Samples from the policy's current weights.

    Order of a step whose engine gives its memory to the trainer meanwhile::

        completions = engine.generate(requests, sampling)           # weights v
        engine.sleep()
        ...                                                         # the trainer scores and steps
        engine.wake(Memory.WEIGHTS)
        engine.update_weights(trainer.export_weights(), version=v + 1)
        engine.wake(Memory.KV_CACHE)

    Requests that stay open over an update are submitted and driven one step at a time::

        tickets = engine.submit(requests, sampling)
        finished = engine.step()                                    # as often as wanted
        engine.update_weights(trainer.export_weights(), version=v + 1)
        finished |= engine.step()                                   # open requests go on with the new weights

    After a failed update the engine refuses to sample until a complete one succeeds.
    """

    weight_version: int

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete every request; results in the order of the requests. Nothing else may be open."""
        ...

    def score(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """Of every token of each row but its first, the natural log-probability at temperature 1."""
        ...

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Ticket]:
        """Queue requests for ``step``; tickets in their order."""
        ...

    def step(self) -> dict[Ticket, Completion]:
        """Advance every running request, by a token as a rule; those that ended."""
        ...

    def abort(self, tickets: Sequence[Ticket]) -> dict[Ticket, Completion]:
        """Drop open requests; what they had written. Tickets that are not open are passed over."""
        ...

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, version: int, verify: bool = False
    ) -> RefitReport:
        """Replace all weights by Hugging Face-named full tensors, and forget everything computed with the old ones.

        Open requests go on with the new weights, their prefixes computed again.

        Args:
            weights: every tensor once, in any order, in the engine's number format.
            version: of these weights.
            verify: take a checksum of every tensor as it arrives.
        """
        ...

    def sleep(self) -> None:
        """Give weights and cache back until ``wake``; nothing happens in an engine built to keep its memory."""
        ...

    def wake(self, memory: Memory) -> None:
        """Take memory again: the weights, which then must be updated, and after that the cache."""
        ...

    def close(self) -> None:
        """Give the engine's memory back for good."""
        ...
