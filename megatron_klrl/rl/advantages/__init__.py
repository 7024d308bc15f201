"""Advantages of the task reward, a small file each. The KL is never among their inputs: see kl/surrogate.py."""

from collections.abc import Callable

from torch import Tensor

from megatron_klrl.rl.advantages.dr_grpo import dr_grpo
from megatron_klrl.rl.advantages.grpo import grpo
from megatron_klrl.rl.advantages.reinforce import reinforce
from megatron_klrl.rl.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from megatron_klrl.rl.advantages.rloo import rloo

__all__ = ["ADVANTAGES", "dr_grpo", "grpo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo"]

ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
"""``[B]`` rewards and the keyword ``group_size`` -> ``[B]`` advantages, by recipe name."""
