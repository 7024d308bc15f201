"""The two passes over logits as kernels that inductor generates, without dynamo.

``make_fx`` traces a pass with symbolic sizes and ``standalone_compile`` compiles the trace: C++ on CPU, Triton on CUDA.
Neither looks at Python frames, so this works where dynamo is switched off (a process that hosts vLLM on CPU sets
TORCHDYNAMO_DISABLE) and under a TorchFunctionMode.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._inductor import standalone_compile
from torch.fx.experimental import _config as shapes
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_klrl.vocab_parallel import bodies, eager

_OPTIONS = {
    "compile_threads": 1,  # here and now, not in a pool of processes beside every rank
    "cpp_cache_precompile_headers": False,  # which take longer to make than all our kernels
}


class CompilingError(Exception):
    """A kernel could not be made. Nothing was run, nothing written."""


class Compiled:
    """Kernels made so far, by pass, device, types, number of columns and layout."""

    def __init__(self) -> None:
        self._made: dict[tuple, Callable] = {}

    def partition(self, logits: Tensor, ref_logits: Tensor | None, *, scale: float, entropy: bool) -> dict[str, Tensor]:
        """As :func:`eager.partition`.

        Raises:
            CompilingError: there is no kernel.
        """
        body = bodies.partition_entropy if entropy else bodies.partition
        factor = torch.full((), scale, dtype=torch.float32, device=logits.device)
        parts: list[dict[str, Tensor]] = []
        for rows in _blocks(logits):
            own = self._run(body, logits[rows], factor)
            found = dict(zip(("log_z", "entropy"), own, strict=False))
            if ref_logits is not None:
                (ref_log_z,) = self._run(bodies.partition, ref_logits[rows], factor)
                both = own[0].unsqueeze(-1), ref_log_z.unsqueeze(-1)
                gap, value = self._run(bodies.compare, logits[rows], ref_logits[rows], *both, factor)
                found |= {"ref_log_z": ref_log_z, "gap": gap, "full_kl": value}
            parts.append(found)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def gradient(
        self,
        out: Tensor,
        logits: Tensor,
        ref_logits: Tensor | None,
        *,
        scale: float,
        log_z: Tensor,
        coefficients: dict[str, Tensor],
    ) -> None:
        """As :func:`kernels.gradient`.

        Raises:
            CompilingError: there is no kernel.
        """
        given = {"scale": torch.full((), scale, dtype=torch.float32, device=logits.device)}
        per_row = coefficients | {"log_z": log_z.unsqueeze(-1)}
        body = bodies.gradient_slope if "slope" in coefficients else bodies.gradient
        if ref_logits is not None and "tilt" in coefficients:
            body = bodies.gradient_tilt
            per_row["ref_logits"] = ref_logits
            per_row.setdefault("slope", torch.zeros_like(coefficients["constant"]))
        names = [name for name in body.__annotations__ if name not in ("out", "logits", "return")]
        for rows in _blocks(logits):
            others = [given[name] if name in given else per_row[name][rows] for name in names]
            # the compiler takes inputs that are written to apart from those that are read, unless they are one
            if out.data_ptr() == logits.data_ptr():
                self._run(bodies.in_place(body), logits[rows], *others)
            else:
                self._run(body, out[rows], logits[rows], *others)

    def _run(self, body: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        key = (body.__name__, tensors[0].device, *map(_kind, tensors))
        if key not in self._made:
            self._made[key] = _compile(body, tensors)
        return self._made[key](*tensors)


def _kind(tensor: Tensor) -> tuple:
    """What a kernel may rely on; the number of rows is not among it."""
    if tensor.ndim < 2:
        return (tensor.dtype,)
    return tensor.dtype, tensor.shape[1], tensor.is_contiguous()


def _compile(body: Callable, tensors: tuple[Tensor, ...]) -> Callable:
    try:
        # two sizes that happen to be equal now are not the same size
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            graph = make_fx(body, tracing_mode="symbolic")(*tensors)
            options = {"config_patches": _OPTIONS}
            return standalone_compile(graph, list(tensors), dynamic_shapes="from_graph", options=options)
    except Exception as problem:  # compilers fail in many ways, none of which may stop a run that has an eager form
        raise CompilingError(f"{type(problem).__name__}: {problem}") from problem


def _blocks(logits: Tensor) -> Iterator[slice]:
    """On CPU runs of rows that stay in the cache between the loops of a kernel; all of them on CUDA.

    Never a single row unless there is but one: a size of one would be compiled in.
    """
    count = len(logits)
    step = max(2, eager.rows_at_once(logits)) if logits.device.type == "cpu" else max(count, 1)
    start = 0
    while start < count:
        stop = count if count - start <= step + 1 else start + step
        yield slice(start, stop)
        start = stop
