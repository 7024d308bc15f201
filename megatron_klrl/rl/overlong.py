"""DAPO's rule for responses that are nearly, or altogether, too long."""

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer: int) -> Tensor:
    """What is added to the reward of a response for its length.

    Value: 0 up to ``max_tokens - buffer`` tokens, then linearly down to -1 at ``max_tokens``.
    Gradient: none; as part of the reward it is another objective than the task's alone.
    Units: of reward.

    Args:
        lengths: ``[B]`` response tokens.
        max_tokens: longest response.
        buffer: last tokens over which the penalty grows, 1 to ``max_tokens``.

    Returns:
        ``[B]`` float32, in [-1, 0].

    Raises:
        ValueError: the buffer is empty or longer than a response, or a response is longer than ``max_tokens``.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"the buffer must have 1 to {max_tokens} tokens, has {buffer}")
    if bool((lengths > max_tokens).any()):
        raise ValueError(f"a response has {int(lengths.max())} tokens, more than max_tokens {max_tokens}")
    return -((lengths - (max_tokens - buffer)).clamp(min=0).float() / buffer)
