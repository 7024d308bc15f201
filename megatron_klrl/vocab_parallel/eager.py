"""The two passes over logits, in torch operations on a few rows at a time whose temporaries stay in the cache.

torch's softmax is one vectorised kernel on CPU; what is added to it works on rows that are still in the cache, so a
pass costs little more than the softmax alone. Nothing here waits for a device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 5 * 2**19, "cuda": 2**26}  # of one buffer; on CUDA launches count, not the cache
_BLOCK_BYTES_PER_THREAD = 5 * 2**18


def partition(logits: Tensor, ref_logits: Tensor | None, *, scale: float, entropy: bool) -> dict[str, Tensor]:
    """Numbers per token of the softmax over these columns alone.

    Args:
        logits: ``[n, size]`` any float dtype.
        ref_logits: same shape, or None.
        scale: multiplies both.
        entropy: whether to give it.

    Returns:
        ``[n]`` float32 each: ``log_z``; ``entropy`` if asked; with a reference ``ref_log_z``, ``gap`` (the mean of
        logit minus reference logit under the policy) and ``full_kl``.
    """
    compared = ref_logits is not None
    names = ["log_z"] + ["entropy"] * entropy + ["ref_log_z", "gap", "full_kl"] * compared
    found = {name: torch.empty(len(logits), dtype=torch.float32, device=logits.device) for name in names}
    blocks = _Blocks(logits, buffers=6 if compared else 3)
    for rows in blocks:
        x = blocks.scaled(0, logits[rows], scale)
        p, total, log_z = _softmax(x, blocks.take(1, x))
        found["log_z"][rows] = log_z
        if entropy:
            found["entropy"][rows] = log_z - _dot(p, x, blocks.take(2, x)).div_(total)
        if ref_logits is not None:
            y = blocks.scaled(3, ref_logits[rows], scale)
            q, _, ref_log_z = _softmax(y, blocks.take(4, y))
            offset = log_z - ref_log_z
            log_ratio = torch.sub(x, y, out=blocks.take(5, x)).sub_(offset.unsqueeze(-1))
            found["ref_log_z"][rows] = ref_log_z
            found["gap"][rows] = _dot(p, log_ratio, blocks.take(2, x)).div_(total).add_(offset)
            found["full_kl"][rows] = _divergence(p, q, log_ratio, blocks.take(2, x))
    return found


def gradient(
    out: Tensor, logits: Tensor, ref_logits: Tensor | None, *, scale: float, coefficients: dict[str, Tensor]
) -> None:
    """Write ``p (constant + slope x + tilt (x - y))`` to ``out``, which may be ``logits`` itself.

    ``p`` is the softmax over these columns alone, ``x`` and ``y`` the scaled logits and reference logits.

    Args:
        out: ``[n, size]``.
        logits: ``[n, size]`` any float dtype.
        ref_logits: same shape; read only where there is a ``tilt``.
        scale: multiplies both.
        coefficients: ``[n, 1]`` float32 each: ``constant``, and ``slope`` and ``tilt`` where they are not zero.
    """
    slope, tilt = coefficients.get("slope"), coefficients.get("tilt")
    blocks = _Blocks(logits, buffers=4 if tilt is not None else 3)
    for rows in blocks:
        x = blocks.scaled(0, logits[rows], scale)
        p = torch.softmax(x, -1, out=blocks.take(1, x))
        factor = coefficients["constant"][rows]
        if slope is not None:
            factor = torch.addcmul(factor, x, slope[rows], out=blocks.take(2, x))
        if tilt is not None and ref_logits is not None:
            y = blocks.scaled(3, ref_logits[rows], scale)
            factor = torch.addcmul(factor, torch.sub(x, y, out=blocks.take(3, y)), tilt[rows], out=blocks.take(2, x))
        torch.mul(p, factor, out=out[rows])


def _softmax(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities up to a common factor near one, their sum, and log Z of ``x``.

    torch's softmax sums without care: over 150 000 columns its probabilities sum to one within 1e-5 only. Summed again
    with care they give what log Z lacks.
    """
    p = torch.softmax(x, -1, out=out)
    total = p.sum(-1)
    return p, total, x.amax(-1) + (total / p.amax(-1)).log_()


def _divergence(p: Tensor, q: Tensor, log_ratio: Tensor, buffer: Tensor) -> Tensor:
    """KL(p || q) as a sum of terms that are never negative; overwrites ``q``. See ``bodies.divergence``."""
    near = torch.neg(log_ratio, out=buffer).clamp_(max=1.0).expm1_().add_(log_ratio)
    return near.mul_(p).sum(-1) + q.sub_(p, alpha=math.e).relu_().sum(-1)


def _dot(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """Row by row."""
    return torch.mul(left, right, out=buffer).sum(-1)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of ``[n, size]`` logits make a block."""
    budget = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES["cuda"])
    if logits.device.type == "cpu":
        budget = max(budget, torch.get_num_threads() * _BLOCK_BYTES_PER_THREAD)
    count, size = logits.shape
    return min(max(1, budget // (4 * max(size, 1))), max(count, 1))


class _Blocks:
    """Cuts ``[n, size]`` into runs of rows, and hands out the same buffers for each."""

    def __init__(self, logits: Tensor, *, buffers: int) -> None:
        self._count, self._size = logits.shape
        self._rows, self._device = rows_at_once(logits), logits.device
        self._buffers: list[Tensor | None] = [None] * buffers

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self._count, self._rows):
            yield slice(start, min(start + self._rows, self._count))

    def take(self, number: int, like: Tensor) -> Tensor:
        """Buffer ``number``, float32, as many rows as ``like`` has."""
        buffer = self._buffers[number]
        if buffer is None:
            buffer = torch.empty(self._rows, self._size, dtype=torch.float32, device=self._device)
            self._buffers[number] = buffer
        return buffer[: len(like)]

    def scaled(self, number: int, logits: Tensor, scale: float) -> Tensor:
        """``logits * scale`` in float32: the logits themselves where that is what they are, else in a buffer."""
        if logits.dtype == torch.float32:
            return logits if scale == 1.0 else torch.mul(logits, scale, out=self.take(number, logits))
        buffer = self.take(number, logits).copy_(logits)
        return buffer if scale == 1.0 else buffer.mul_(scale)
