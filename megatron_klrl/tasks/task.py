"""The two methods that make a task."""

from collections.abc import Sequence
from typing import Protocol

from megatron_klrl.types import Prompt


class Task(Protocol):
    """An endless, deterministic stream of prompts and the verifier of their answers.

    Every rank builds its own copy and must see the same prompts, so nothing may depend on what was asked for before.
    """

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream; the same for every caller and every batch size."""
        ...

    def verify(self, prompt: Prompt, completion_ids: Sequence[int], finish_reason: str) -> float:
        """Reward of one completion.

        Args:
            prompt: the prompt that was answered.
            completion_ids: what the policy wrote, the end-of-sequence token included.
            finish_reason: why generation ended, in the engine's words (`stop`, `length`, `abort`).
        """
        ...
