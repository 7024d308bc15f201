"""The two passes over logits that cost something, and which form of them runs.

``partition`` reads logits and leaves a few numbers per token; ``gradient`` reads them again and writes the gradient,
over the logits themselves if wished. All else in this package works on numbers per token.
"""

import warnings
from enum import StrEnum

from torch import Tensor

from megatron_klrl.vocab_parallel import eager
from megatron_klrl.vocab_parallel.compiled import Compiled, CompilingError

# Logits of a piece from which on AUTO compiles. The first kernel costs 5 to 20 seconds, each further one two; on CPU a
# pass over 2**24 logits takes some 10 ms less for it, on CUDA the eager form is bound by its launches.
_WORTH_COMPILING = {"cpu": 2**24, "cuda": 2**20}


class Kernels(StrEnum):
    """Form of the passes.

    Attributes:
        AUTO: compiled for large pieces of logits, eager for small ones.
        EAGER: torch operations on rows that stay in the cache; nothing is compiled.
        COMPILED: kernels generated at first use, which takes seconds; inductor keeps them on disk.
    """

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"


class _InUse:
    """Of this process."""

    kernels = Kernels.AUTO
    compiled: Compiled | None = Compiled()  # None where nothing can be compiled


def use(kernels: Kernels) -> None:
    """Choose the form for this process. Results agree within rounding (docs/design/policy-head.md).

    Where nothing can be compiled (no C++ compiler on CPU, no Triton on CUDA, an error of the compiler) the eager form
    runs whatever is chosen, after one warning that says what is missing.
    """
    _InUse.kernels = kernels
    _InUse.compiled = _InUse.compiled or Compiled()


def partition(logits: Tensor, ref_logits: Tensor | None, *, scale: float, entropy: bool) -> dict[str, Tensor]:
    """Numbers per token of the softmax over these columns alone; see :func:`eager.partition`."""
    compiled = _compiled(logits)
    if compiled is not None:
        try:
            return compiled.partition(logits, ref_logits, scale=scale, entropy=entropy)
        except CompilingError as problem:
            _do_without(logits, problem)
    return eager.partition(logits, ref_logits, scale=scale, entropy=entropy)


def gradient(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    *,
    scale: float,
    log_z: Tensor,
    coefficients: dict[str, Tensor],
) -> None:
    """Write ``p (constant + slope x + tilt (x - y))`` to ``out``; see :func:`eager.gradient`.

    Args:
        out: ``[n, size]``; apart from ``logits``, or the same.
        logits: ``[n, size]``.
        ref_logits: same shape; read only where there is a ``tilt``.
        scale: multiplies both.
        log_z: ``[n]`` of these columns alone.
        coefficients: ``[n, 1]`` float32 each.
    """
    compiled = _compiled(logits)
    if compiled is not None:
        try:
            compiled.gradient(out, logits, ref_logits, scale=scale, log_z=log_z, coefficients=coefficients)
        except CompilingError as problem:
            _do_without(logits, problem)
        else:
            return
    eager.gradient(out, logits, ref_logits, scale=scale, coefficients=coefficients)


def _compiled(logits: Tensor) -> Compiled | None:
    """The kernels, if they are to run for this piece."""
    if _InUse.kernels is Kernels.EAGER or len(logits) < 2 or logits.stride(-1) != 1:
        return None
    worth = _WORTH_COMPILING.get(logits.device.type, _WORTH_COMPILING["cuda"])
    if _InUse.kernels is Kernels.AUTO and logits.numel() < worth:
        return None
    return _InUse.compiled


def _do_without(logits: Tensor, problem: CompilingError) -> None:
    _InUse.compiled = None
    needed = "a C++ compiler (g++)" if logits.device.type == "cpu" else "Triton (pip install triton) and a C compiler"
    reason = str(problem).strip().splitlines()[0]
    warnings.warn(
        f"The passes over the logits run uncompiled, which is slower and gives the same results. Compiling them needs "
        f"{needed}; vocab_parallel.kernels.use(Kernels.EAGER) asks for this form and silences the warning. {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
