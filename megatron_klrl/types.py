"""Frozen dataclasses that cross module borders."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, rendered for the policy.

    Attributes:
        index: position in the stream of its task, from 0; the same index of the same task is the same prompt.
        token_ids: what the policy is conditioned on.
        text: the same as text, special tokens included.
        answer: what the verifier compares with; never shown to the policy.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    answer: str
