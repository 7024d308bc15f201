"""Waiting rollouts in a checkpoint: tokens and log-probabilities bit for bit; prompts by their place in the stream."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_klrl.generation.engine import Completion
from megatron_klrl.loop.producer import Produced
from megatron_klrl.loop.rollout import Rollouts
from megatron_klrl.tasks.task import Task

_STEPS = "steps"
_PARTS = ("prompts", "lengths", "tokens", "logprobs", "versions", "rewards")


def write(path: Path, waiting: Sequence[Produced]) -> None:
    """Write the rollouts of all waiting steps into one safetensors file."""
    tensors: dict[str, Tensor] = {}
    for each in waiting:
        completions = each.rollouts.completions
        parts = {
            "prompts": torch.tensor([prompt.index for prompt in each.rollouts.prompts]),
            "lengths": torch.tensor([len(completion.token_ids) for completion in completions]),
            "tokens": torch.tensor([token for completion in completions for token in completion.token_ids]),
            "logprobs": torch.tensor(
                [x for completion in completions for x in completion.logprobs], dtype=torch.float64
            ),
            "versions": torch.tensor([completion.weight_version for completion in completions]),
            "rewards": torch.tensor(each.rollouts.rewards, dtype=torch.float64),
        }
        tensors |= {f"{each.step}/{name}": tensor for name, tensor in parts.items()}
    facts = [
        {
            "step": each.step,
            "rounds": each.rounds,
            "equal_groups": each.equal_groups,
            "verifier_timeouts": each.verifier_timeouts,
            "verifier_errors": each.verifier_errors,
            "finish_reasons": [completion.finish_reason for completion in each.rollouts.completions],
        }
        for each in waiting
    ]
    save_file(tensors, path, metadata={_STEPS: json.dumps(facts)})


def read(path: Path, task: Task) -> list[Produced]:
    """What ``write`` wrote.

    Args:
        path: of the file.
        task: gives the prompts back by their place in its stream.
    """
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[_STEPS])
    return [
        _produced(fact, {name: tensors[f"{fact['step']}/{name}"].tolist() for name in _PARTS}, task) for fact in facts
    ]


def _produced(fact: dict[str, Any], parts: dict[str, list[Any]], task: Task) -> Produced:
    tokens, logprobs = iter(parts["tokens"]), iter(parts["logprobs"])
    completions = [
        Completion(
            token_ids=tuple(islice(tokens, length)),
            logprobs=tuple(islice(logprobs, length)),
            finish_reason=reason,
            weight_version=version,
        )
        for length, reason, version in zip(parts["lengths"], fact["finish_reasons"], parts["versions"], strict=True)
    ]
    prompts = [task.prompts(index, 1)[0] for index in parts["prompts"]]
    found = Rollouts(prompts=prompts, completions=completions, rewards=parts["rewards"])
    kept = {name: fact[name] for name in ("step", "rounds", "equal_groups", "verifier_timeouts", "verifier_errors")}
    return Produced(rollouts=found, **kept)
