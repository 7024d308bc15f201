"""Requests that the tests of this folder share, and the probabilities they are checked against."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_klrl.generation.engine import Completion, Request, Sampling
from tests.generation.conftest import named_weights

EOS = 1
SAMPLING = Sampling(temperature=1.0, max_tokens=12, stop_ids=(EOS,))
REQUESTS = [Request(prompt_ids=(2, 5 + i % 4, 9, 10, 3), seed=100 + i) for i in range(12)]
LOGPROB_ATOL = 5e-5
"""float32 on both sides, other kernels and another order of sums; log-probabilities lie in 0..15."""

NamedWeights = list[tuple[str, torch.Tensor]]


def oracle(folder: Path, weights: NamedWeights | None = None) -> torch.nn.Module:
    """transformers' model of a folder, or with other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
    return model


def exact_logprobs(
    model: torch.nn.Module, request: Request, completion: Completion, sampling: Sampling = SAMPLING
) -> torch.Tensor:
    """What the completion's log-probabilities must be, from transformers' logits."""
    ids = torch.tensor([request.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(request.prompt_ids) - 1 :]
    rows = [distribution(row, sampling)[token] for row, token in zip(logits, completion.token_ids, strict=True)]
    return torch.stack(rows)


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of every token under ``Sampling``'s definition, written out: ``-inf`` for what is cut off."""
    tempered = logits if sampling.temperature == 0 else logits / sampling.temperature
    order = sorted(range(len(tempered)), key=lambda token: -float(tempered[token]))
    kept = order[: sampling.top_k or len(order)]
    probabilities = torch.softmax(tempered[kept], -1).tolist()
    nucleus, reached = [], 0.0
    for token, probability in zip(kept, probabilities, strict=True):
        if reached >= sampling.top_p:
            break
        nucleus.append(token)
        reached += probability
    found = torch.full_like(tempered, -torch.inf)
    found[nucleus] = torch.log_softmax(tempered[nucleus], -1)
    return found


def assert_sampled_from(
    model: torch.nn.Module,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    sampling: Sampling = SAMPLING,
) -> None:
    """Every reported log-probability is that of the distribution the definition gives."""
    for request, completion in zip(requests, completions, strict=True):
        expected = exact_logprobs(model, request, completion, sampling)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=LOGPROB_ATOL)


def perturbed(folder: Path, seed: int = 0) -> NamedWeights:
    """The folder's weights, moved far enough that other tokens are drawn."""
    generator = torch.Generator().manual_seed(seed)
    return [(n, w + 0.1 * torch.randn(w.shape, generator=generator)) for n, w in named_weights(folder)]
