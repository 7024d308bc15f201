"""Completions whose log-probabilities are asked for, and nothing else."""

from collections.abc import Mapping

import torch

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import Replay


class Scoring(Replay):
    """The rows of ``Replay``, forward only."""

    def size(self) -> Mapping[str, float]:
        """Two operations per parameter and token, and the weights once."""
        sizes = super().size()
        return {**sizes, "least_bytes": sizes["input_bytes"], "least_flops": sizes["least_flops"] / 5}

    @torch.no_grad()
    def truth(self) -> Answer:
        """In float64 with transformers."""
        policy = self.loaded(self.policy)
        return self.scored(torch.cat([self.logprobs(policy, number) for number in range(len(self.prompts))]))
