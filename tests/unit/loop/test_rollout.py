"""Rollouts as tensors: what is masked, what is aligned with what."""

import pytest
import torch

from megatron_klrl.errors import WorkError
from megatron_klrl.generation.engine import Completion
from megatron_klrl.loop.rollout import Rollouts, collate
from megatron_klrl.types import Prompt


def found() -> Rollouts:
    prompts = [
        Prompt(index=0, token_ids=(5, 6, 7), text="", answer=""),
        Prompt(index=1, token_ids=(8,), text="", answer=""),
    ]
    completions = [
        Completion(token_ids=(9, 1), logprobs=(-0.5, -0.25), finish_reason="stop", weight_version=3),
        Completion(token_ids=(2, 3, 4), logprobs=(-1.0, -2.0, -3.0), finish_reason="length", weight_version=4),
    ]
    return Rollouts(prompts=prompts, completions=completions, rewards=[1.0, 0.0])


def test_targets_are_aligned_by_hand() -> None:
    batch = collate(found(), device=torch.device("cpu"))
    assert batch.tokens.shape == (2, 9), "padded to a multiple of 8 targets"
    assert batch.tokens[0, :5].tolist() == [5, 6, 7, 9, 1]
    assert batch.response_mask[0].nonzero().flatten().tolist() == [2, 3]
    assert batch.response_mask[1].nonzero().flatten().tolist() == [0, 1, 2]
    assert batch.tokens[:, 1:][batch.response_mask].tolist() == [9, 1, 2, 3, 4], "the mask picks the sampled tokens"
    assert batch.rollout_logprobs[batch.response_mask].tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.weight_version.tolist() == [3, 4]
    assert batch.rewards.tolist() == [1.0, 0.0]


def test_an_empty_response_is_an_error() -> None:
    rollouts = found()
    rollouts.completions[0] = Completion(token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    with pytest.raises(WorkError, match="empty response"):
        collate(rollouts, device=torch.device("cpu"))
