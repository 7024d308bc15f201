"""Peak memory of this rank."""

import resource

import torch

_KIB_PER_GIB = 2**20


def peak_gib() -> float:
    """Peak memory since the start, in GiB: device memory where CUDA is used, else resident memory of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB  # Linux counts in KiB
