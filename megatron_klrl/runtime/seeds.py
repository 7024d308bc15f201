"""Seeds derived from names, so that no result depends on batching, rank or order of calls."""

import hashlib
import random

import numpy as np
import torch

_BITS = 63  # vLLM hands the seed to torch.Generator.manual_seed, which takes a signed 64-bit integer


def derive(seed: int, *names: int | str) -> int:
    """A seed in [0, 2**63) for one named use, for example ``derive(seed, "rollout", step, prompt, sample)``."""
    text = "/".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _BITS)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and random in this process."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
