"""Samples of a step as records that a person can read: texts, reward, token log-probabilities under each policy."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.loop.rollout import Rollouts


def records(
    found: Rollouts, batch: RolloutBatch, scores: TokenScores, tokenizer: PreTrainedTokenizerBase, *, count: int
) -> list[dict[str, Any]]:
    """The first ``count`` rows of a step."""
    chosen = []
    for row in range(min(count, len(found.prompts))):
        mask, completion = batch.response_mask[row], found.completions[row]
        record: dict[str, Any] = {
            "prompt": found.prompts[row].text,
            "answer": found.prompts[row].answer,
            "response": tokenizer.decode(list(completion.token_ids)),
            "reward": found.rewards[row],
            "finish_reason": completion.finish_reason,
            "weight_version": completion.weight_version,
            "prompt_ids": list(found.prompts[row].token_ids),
            "token_ids": list(completion.token_ids),
            "rollout_logprobs": list(completion.logprobs),
            "old_logprobs": scores.old_logprobs[row][mask].tolist(),
        }
        if scores.ref_logprobs is not None:
            record["ref_logprobs"] = scores.ref_logprobs[row][mask].tolist()
        chosen.append(record)
    return chosen
