"""What makes a task, and what goes in and out of its verifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_klrl.types import Prompt


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy wrote.

    Attributes:
        prompt: that was answered.
        token_ids: of the completion, the end-of-sequence token included where there is one.
    """

    prompt: Prompt
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Rewards of responses, in their order.

    Attributes:
        rewards: one for each response; 0 where the verifier gave none.
        timeouts: responses whose verification took too long.
        errors: responses on which the verifier failed.
    """

    rewards: list[float]
    timeouts: int = 0
    errors: int = 0


class Task(Protocol):
    """An endless, deterministic stream of prompts and the verifier of their answers.

    Every rank builds its own copy and must see the same prompts, so nothing may depend on what was asked for before.
    """

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of the data: prompts left out for their length, answers compared as text."""
        ...

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream; the same for every caller and every batch size."""
        ...

    def verify(self, responses: Sequence[Response]) -> Verdicts:
        """Rewards of a batch, in one call: a verifier may work on several responses at a time."""
        ...
