"""Small enumerable problems that the tests of this folder share."""

import torch
from torch import Tensor

from megatron_klrl.kl.exact import Sharing, Space, build_space
from megatron_klrl.kl.measure import Problem, build_problem


def small_space(*, sharing: Sharing = Sharing.SHARED, num_prompts: int = 2) -> Space:
    """Seven responses to each prompt."""
    return build_space(num_prompts=num_prompts, vocab_size=3, max_tokens=2, sharing=sharing)


def random_parameters(space: Space, *, seed: int, scale: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(space.num_parameters, generator=generator, dtype=torch.float64)


def random_problem(space: Space, *, on_policy: bool, seed: int = 0) -> Problem:
    reference = random_parameters(space, seed=seed)
    policy = reference + random_parameters(space, seed=seed + 1)
    rollout = policy if on_policy else policy + random_parameters(space, seed=seed + 2, scale=0.3)
    return build_problem(space, policy=policy, reference=reference, rollout=rollout)
