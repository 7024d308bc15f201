"""What TensorBoard shows of a step beside its scalars: distributions over tokens, the KL by position and token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.loop.rollout import Rollouts

_TOKENS, _SAMPLES, _CONTEXT = 12, 4, 8
_LOOKED_AT = 512  # of the largest: completions of one prompt begin alike, and each of these tokens is shown once


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Of one step.

    Attributes:
        histograms: values over response tokens, by tag.
        profiles: means at each position of a response, by tag.
        texts: Markdown, by tag.
    """

    histograms: dict[str, np.ndarray]
    profiles: dict[str, list[float]]
    texts: dict[str, str]


def due(step: int, *, steps: int) -> bool:
    """Whether a step is shown in detail: the first, the last, and about twenty between them."""
    return step in (1, steps) or step % max(1, steps // 20) == 0


def details(found: Rollouts, batch: RolloutBatch, scores: TokenScores, tokenizer: PreTrainedTokenizerBase) -> Details:
    """Look at one step's tokens. Logarithms are natural; the old policy is the trainer's, before the update."""
    mask = batch.response_mask
    drift = scores.old_logprobs - batch.rollout_logprobs
    histograms = {"mismatch/log_ratio": _of(drift, mask), "mismatch/ratio": _of(drift.exp(), mask)}
    profiles, texts = {}, {"samples": _samples(found, tokenizer)}
    if scores.full_kl is not None and scores.ref_logprobs is not None:
        away = scores.old_logprobs - scores.ref_logprobs
        histograms |= {"kl/per_token": _of(scores.full_kl, mask), "kl/log_ratio": _of(away, mask)}
        profiles["kl/by_position"] = by_position(scores.full_kl, mask)
        texts["drifted_tokens"] = _drifted(scores.full_kl, away, batch, tokenizer)
    return Details(histograms=histograms, profiles=profiles, texts=texts)


def _of(values: Tensor, mask: Tensor) -> np.ndarray:
    return values[mask].float().cpu().numpy()


def by_position(per_token: Tensor, mask: Tensor) -> list[float]:
    """Mean at each position of the response, over the responses that are that long."""
    positions = (mask.int().cumsum(-1) - 1).clamp(min=0)
    longest = int(mask.sum(-1).max())
    sums, counts = (per_token.new_zeros(longest) for _ in range(2))
    flat = positions[mask]
    sums.index_add_(0, flat, per_token[mask].to(sums.dtype))
    counts.index_add_(0, flat, per_token.new_ones(flat.shape))
    return (sums / counts).tolist()


def _samples(found: Rollouts, tokenizer: PreTrainedTokenizerBase) -> str:
    rows = [
        (f"{reward:g}", found.prompts[row].text, _text(tokenizer, found.completions[row].token_ids))
        for row, reward in enumerate(found.rewards[:_SAMPLES])
    ]
    return _table(("reward", "prompt", "response"), rows)


def _drifted(full_kl: Tensor, away: Tensor, batch: RolloutBatch, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens where policy and reference differ most over the whole vocabulary, each once with what stood before."""
    width = full_kl.shape[1]
    flat = full_kl.masked_fill(~batch.response_mask, -1.0).flatten()
    rows: dict[tuple[str, str], tuple[str, str]] = {}
    for place in flat.topk(min(_LOOKED_AT, int(batch.response_mask.sum()))).indices.tolist():
        row, column = divmod(place, width)
        before = batch.tokens[row, max(0, column + 1 - _CONTEXT) : column + 1].tolist()
        key = (_text(tokenizer, before), _text(tokenizer, [int(batch.tokens[row, column + 1])]))
        if len(rows) < _TOKENS:
            rows.setdefault(key, (f"{float(full_kl[row, column]):.3f}", f"{float(away[row, column]):+.3f}"))
    titles = ("... before", "token", "KL of the position, nats", "log policy / reference")
    return _table(titles, [(*key, *values) for key, values in rows.items()])


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids)))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([f"`{_plain(cell)}`" for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    return text.replace("|", "\u2223").replace("`", "'").replace("\n", "\u21b5") or " "
