"""What this machine can do at best, measured in the same run: copies and matrix products."""

import time
from collections.abc import Callable

import torch

_REPEATS = 5


def ceilings(device: str) -> dict[str, float]:
    """``copy_bytes_per_s``, read and written bytes both counted, and ``gemm_flops_per_s``: the best of a few tries.

    On CPU float32 by the wall clock over all threads; on CUDA bfloat16 products.
    """
    on_gpu = device == "cuda"
    size, edge, dtype = (2**30, 8192, torch.bfloat16) if on_gpu else (2**28, 2048, torch.float32)
    source = torch.empty(size, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), on_gpu=on_gpu)
    left, right = (torch.randn(edge, edge, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty(edge, edge, dtype=dtype, device=device)
    gemm_s = _best(lambda: torch.mm(left, right, out=product), on_gpu=on_gpu)
    return {"copy_bytes_per_s": 2 * size / copy_s, "gemm_flops_per_s": 2 * edge**3 / gemm_s}


def _best(call: Callable[[], object], *, on_gpu: bool) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
