"""Policies small enough to enumerate: exact KLs, exact gradients, the exact optimum. The oracle of the audit.

Written from the definitions, by enumeration and automatic differentiation of expectations; nothing here uses an
estimator, a score function or the surrogate, so that agreement with them means something. Everything is float64.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import torch
from torch import Tensor

END = 0
"""The end-of-sequence token; it is written by the policy and counts."""


class Sharing(StrEnum):
    """How parameters make logits.

    ``tabular``: one per prefix and token. ``shared``: prompt, position, last token and token counts add up, so that one
    parameter moves many prefixes, as in a network.
    """

    TABULAR = "tabular"
    SHARED = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every response to every prompt, one per row, laid out as a training batch.

    N responses, S columns, H prefixes ("states"), V tokens, P parameters. Prompt x occupies x + 1 columns before its
    response, so that masks are ragged on both sides.

    Attributes:
        prompts: ``[N]`` which prompt a row answers; prompts are equally likely.
        tokens: ``[N, S]`` the token written at a column; 0 where masked.
        mask: ``[N, S]`` bool, true at the response, end-of-sequence included.
        states: ``[N, S]`` index of the prefix before a column; 0 where masked.
        design: ``[H, V, P]``: logits of a prefix are ``design @ parameters``.
    """

    prompts: Tensor
    tokens: Tensor
    mask: Tensor
    states: Tensor
    design: Tensor

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return int(self.prompts.max()) + 1

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.design.shape[2]


def build_space(*, num_prompts: int, vocab_size: int, max_tokens: int, sharing: Sharing) -> Space:
    """All responses of at most ``max_tokens`` tokens; one that reaches the limit ends there with any token.

    Args:
        num_prompts: equally likely.
        vocab_size: with the end-of-sequence token.
        max_tokens: with the end-of-sequence token.
        sharing: how parameters make logits.
    """
    responses = _responses(vocab_size, max_tokens)
    width = num_prompts + max_tokens
    states: dict[tuple[int, tuple[int, ...]], int] = {}
    prompts, tokens, mask, rows = [], [], [], []
    for prompt, response in product(range(num_prompts), responses):
        start = prompt + 1
        row_states = [states.setdefault((prompt, response[:t]), len(states)) for t in range(len(response))]
        prompts.append(prompt)
        tokens.append(_placed(response, start, width))
        rows.append(_placed(tuple(row_states), start, width))
        mask.append([start <= column < start + len(response) for column in range(width)])
    return Space(
        prompts=torch.tensor(prompts),
        tokens=torch.tensor(tokens),
        mask=torch.tensor(mask),
        states=torch.tensor(rows),
        design=_design(list(states), vocab_size=vocab_size, sharing=sharing),
    )


def state_logprobs(space: Space, parameters: Tensor) -> Tensor:
    """``[H, V]`` natural-log probabilities of every token after every prefix."""
    return (space.design @ parameters).log_softmax(-1)


def token_logprobs(space: Space, parameters: Tensor) -> Tensor:
    """``[N, S]`` log-probabilities of the written tokens; zero where masked."""
    taken = state_logprobs(space, parameters)[space.states, space.tokens]
    return torch.where(space.mask, taken, 0.0)


def response_probs(space: Space, parameters: Tensor) -> Tensor:
    """``[N]`` probability of each row, prompt included; they add up to 1."""
    return token_logprobs(space, parameters).sum(-1).exp() / space.num_prompts


def state_kl(space: Space, parameters: Tensor, other: Tensor) -> Tensor:
    """``[H]`` KL(parameters || other) over the vocabulary after every prefix, nats."""
    left, right = state_logprobs(space, parameters), state_logprobs(space, other)
    return (left.exp() * (left - right)).sum(-1)


def token_kl(space: Space, parameters: Tensor, other: Tensor) -> Tensor:
    """``[N, S]`` the same at every column; zero where masked."""
    return torch.where(space.mask, state_kl(space, parameters, other)[space.states], 0.0)


def sequence_kl(space: Space, parameters: Tensor, other: Tensor) -> Tensor:
    """KL(parameters || other) over whole responses, averaged over prompts; nats, 0-dimensional."""
    log_ratio = (token_logprobs(space, parameters) - token_logprobs(space, other)).sum(-1)
    return (response_probs(space, parameters) * log_ratio).sum()


def sequence_kl_gradient(space: Space, policy: Tensor, reference: Tensor) -> Tensor:
    """``[P]`` gradient of the sequence-level reverse KL(policy || reference)."""
    moving = policy.detach().requires_grad_()
    return _gradient(sequence_kl(space, moving, reference), moving)


def rollout_kl_gradient(space: Space, policy: Tensor, rollout: Tensor) -> Tensor:
    """``[P]`` gradient of KL(rollout || policy) with respect to the policy."""
    moving = policy.detach().requires_grad_()
    return _gradient(sequence_kl(space, rollout, moving), moving)


def token_kl_gradient(space: Space, policy: Tensor, reference: Tensor, *, prefixes: Tensor) -> Tensor:
    """``[P]`` gradient of the sum of per-position KL(policy || reference), visited prefixes held fixed.

    Args:
        space: the responses.
        policy: ``[P]``.
        reference: ``[P]``.
        prefixes: ``[P]`` parameters of the policy whose prefixes are visited.
    """
    moving = policy.detach().requires_grad_()
    return _gradient(_visited(space, token_kl(space, moving, reference), prefixes), moving)


def forward_token_kl_gradient(space: Space, policy: Tensor, reference: Tensor, *, prefixes: Tensor) -> Tensor:
    """``[P]`` the same of KL(reference || policy)."""
    moving = policy.detach().requires_grad_()
    return _gradient(_visited(space, token_kl(space, reference, moving), prefixes), moving)


def objective(space: Space, policy: Tensor, reference: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """``E[R] - beta * KL(policy || reference)``, 0-dimensional; ``rewards`` is ``[N]``."""
    return (response_probs(space, policy) * rewards).sum() - beta * sequence_kl(space, policy, reference)


def optimal_probs(space: Space, reference: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """``[N]`` probabilities of the maximiser ``ref * exp(R / beta) / Z`` per prompt, prompt included."""
    weights = response_probs(space, reference) * torch.exp(rewards / beta)
    totals = torch.zeros(space.num_prompts, dtype=weights.dtype).index_add(0, space.prompts, weights)
    return weights / totals[space.prompts] / space.num_prompts


def _visited(space: Space, values: Tensor, prefixes: Tensor) -> Tensor:
    return (response_probs(space, prefixes).detach() * values.sum(-1)).sum()


def _gradient(value: Tensor, parameters: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, parameters)
    return gradient


def _responses(vocab_size: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Responses that end with END, and those that the limit ends."""
    words = range(1, vocab_size)
    ended = [(*body, END) for length in range(max_tokens) for body in product(words, repeat=length)]
    return ended + list(product(words, repeat=max_tokens))


def _placed(values: tuple[int, ...], start: int, width: int) -> list[int]:
    return [0] * start + list(values) + [0] * (width - start - len(values))


def _design(states: list[tuple[int, tuple[int, ...]]], *, vocab_size: int, sharing: Sharing) -> Tensor:
    identity = torch.eye(vocab_size, dtype=torch.float64)
    if sharing is Sharing.TABULAR:
        features = torch.eye(len(states), dtype=torch.float64)
    else:
        features = _shared_features(states, vocab_size=vocab_size)
    blocks = features[:, None, :, None] * identity[None, :, None, :]
    return blocks.flatten(2)


def _shared_features(states: list[tuple[int, tuple[int, ...]]], *, vocab_size: int) -> Tensor:
    """``[H, F]`` prompt and last token one-hot, counts, position: fewer than prefixes, so prefixes share parameters."""
    num_prompts = 1 + max(prompt for prompt, _ in states)
    rows = []
    for prompt, prefix in states:
        last = prefix[-1] if prefix else END
        one_hot = [float(prompt == x) for x in range(num_prompts)] + [float(last == v) for v in range(vocab_size)]
        counts = [float(prefix.count(v)) for v in range(1, vocab_size)]
        rows.append([*one_hot, *counts, 0.5 * len(prefix) ** 2])
    return torch.tensor(rows, dtype=torch.float64)
