"""What the loop needs of a generation engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


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

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        max_tokens: longest response.
        stop_ids: tokens that end a response and belong to it.
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response.

    Attributes:
        token_ids: sampled tokens, the stop token included.
        logprobs: per token, natural log of the probability it was drawn with: after temperature, from the weights of
            ``weight_version``.
        finish_reason: "stop" when a stop token was drawn, "length" when ``max_tokens`` or the context ended it.
        weight_version: of the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    weight_version: int


class GenerationEngine(Protocol):
    """Samples from the policy's current weights.

    Order: ``update_weights`` may run between calls of ``generate``, never during one. After a failed update the engine
    refuses to generate until a complete one succeeds.
    """

    weight_version: int

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete every request; results in the order of the requests."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace all weights by Hugging Face-named full tensors, and forget every cached prefix."""
        ...

    def close(self) -> None:
        """Give the engine's memory back."""
        ...
