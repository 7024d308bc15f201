"""The loss from logits that exist, on CPU: whole, without any compiler, and cut over two ranks."""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance

WORKLOAD = "benchmarks.workloads.logits:Logits"
WITHOUT = "without entropy"
# float32 log-probabilities of 150,000 columns agree to a few units of 1e-7. With bfloat16 logits the gradient is
# rounded to 8 bits (0.2 %), and some peers round each log-probability too, by up to 3 % of a probability; the tables
# say who.
TOLERANCES = {
    "float32": Tolerance(loss=1e-5, values=1e-5, gradient=1e-4),
    "bfloat16": Tolerance(loss=2e-2, values=2e-2, gradient=5e-2),
}
ENTROPY_NOTE = "overwrites float32 logits, copies bfloat16 ones, gives no entropy; compared with ours that overwrites"
FUSED_NOTE = "rounds the gradient to bfloat16 whatever the logits are, so float32 parity is asked of it to 1 % only"

MEASURE = Contestant(name="measure", factory="benchmarks.peers.ours:from_logits", ours=True)
OVERWRITE = replace(MEASURE, name="measure overwrite", options={"overwrite": True})
PLAIN = replace(MEASURE, name="measure, no entropy", options={"entropy": False}, group=WITHOUT)
PLAIN_OVERWRITE = replace(PLAIN, name="measure overwrite, no entropy", options={"entropy": False, "overwrite": True})
TRL = Contestant(name="TRL", factory="benchmarks.peers.trl:from_logits", requires=("trl",))
VERL = Contestant(name="verl", factory="benchmarks.peers.verl:from_logits", requires=("verl",))
VERL_COMPILED = replace(
    VERL,
    name="verl, entropy compiled",
    options={"compiled_entropy": True},
    note="what its engines do by default; the entropy alone is compiled",
)
NAIVE = Contestant(name="naive", factory="benchmarks.peers.naive:from_logits")
NAIVE_COMPILED = replace(NAIVE, name="naive, torch.compile", options={"compiled": True})
MCORE = Contestant(
    name="Megatron-Core cross entropy",
    factory="benchmarks.peers.megatron_core:from_logits",
    options={"fused": False},
    group=WITHOUT,
    requires=("megatron",),
    note=ENTROPY_NOTE,
)
MCORE_FUSED = replace(
    MCORE,
    name="Megatron-Core fused cross entropy",
    options={"fused": True},
    gradient_tolerance=1e-2,
    note=f"{ENTROPY_NOTE}; {FUSED_NOTE}",
)


def loss_logits() -> Benchmark:
    """Everyone as they come, compilers included."""
    contestants = (
        MEASURE, TRL, OVERWRITE, VERL, VERL_COMPILED, NAIVE, NAIVE_COMPILED,
        PLAIN_OVERWRITE, MCORE, PLAIN, MCORE_FUSED,
    )  # fmt: skip
    return Benchmark(
        name="loss_logits",
        summary="log-probability with gradient, entropy without, clipped loss and 0.04 k3, from logits on CPU",
        cases=_cases(contestants),
        quick_cases=_quick(contestants),
        goals=(
            *(_faster(peer, 5) for peer in ("TRL", "verl")),
            _faster("naive, torch.compile", 1.4),
            # one per cent for what is per token and for page tables
            Goal(
                text="extra memory no more than the gradient's",
                ours="measure", measure="peak_over_input", at_most=1.01,
            ),
            Goal(
                text="extra memory at most half of TRL's",
                ours="measure", measure="peak_share", against="TRL", at_most=0.505,
            ),
            Goal(
                text="no extra memory where the gradient overwrites the logits",
                ours="measure overwrite", measure="peak_over_input", at_most=0.05,
            ),
        ),
    )  # fmt: skip


def loss_logits_eager() -> Benchmark:
    """The same without a compiler: what a machine without one, or a process that may not compile, gets."""
    ours = replace(MEASURE, name="measure, eager", options={"form": "eager"})
    overwrite = replace(ours, name="measure overwrite, eager", options={"form": "eager", "overwrite": True})
    plain = replace(ours, name="measure, eager, no entropy", options={"form": "eager", "entropy": False}, group=WITHOUT)
    plain_overwrite = replace(
        plain,
        name="measure overwrite, eager, no entropy",
        options={"form": "eager", "entropy": False, "overwrite": True},
    )
    contestants = (ours, TRL, overwrite, VERL, NAIVE, plain_overwrite, MCORE, plain)
    return Benchmark(
        name="loss_logits_eager",
        summary="the same from logits on CPU, nobody compiles anything",
        cases=_cases(contestants, environment={"TORCHDYNAMO_DISABLE": "1"}),
        quick_cases=_quick(contestants, environment={"TORCHDYNAMO_DISABLE": "1"}),
        goals=(
            *(_faster(peer, 1.5, ours="measure, eager") for peer in ("TRL", "verl")),
            _faster("naive", 1.0, ours="measure, eager"),
        ),
    )


def tp_loss() -> Benchmark:
    """Two gloo ranks with half of the vocabulary each."""
    together = "two ranks, half of the vocabulary each"
    contestants = (
        replace(OVERWRITE, group=together),
        replace(MCORE, group=together, note="overwrites float32 logits, copies bfloat16 ones, gives no entropy"),
        replace(PLAIN_OVERWRITE, group=together),
        replace(MEASURE, group=together),
        replace(MCORE_FUSED, group=together, note=f"gives no entropy; {FUSED_NOTE}"),
    )
    full = {"batch": 4, "tokens": 64, "vocab": 151936}
    small = {"batch": 4, "tokens": 16, "vocab": 16384}
    return Benchmark(
        name="tp_loss",
        summary="the same with tensor parallelism 2 over gloo; CPU time is that of both ranks, memory one rank's",
        cases=tuple(_case(full, dtype, contestants, ranks=2) for dtype in TOLERANCES),
        quick_cases=(_case(small, "float32", contestants, ranks=2),),
        goals=(_faster("Megatron-Core cross entropy", 1.5, ours="measure overwrite"),),
    )


def _cases(contestants: tuple[Contestant, ...], environment: Mapping[str, str] | None = None) -> tuple[Case, ...]:
    shapes = ({"batch": 4, "tokens": 64, "vocab": 151936}, {"batch": 16, "tokens": 128, "vocab": 32768})
    return tuple(_case(shape, dtype, contestants, environment=environment) for shape in shapes for dtype in TOLERANCES)


def _quick(contestants: tuple[Contestant, ...], environment: Mapping[str, str] | None = None) -> tuple[Case, ...]:
    shape = {"batch": 4, "tokens": 32, "vocab": 16384}
    return tuple(_case(shape, dtype, contestants, environment=environment) for dtype in TOLERANCES)


def _case(
    shape: Mapping[str, int],
    dtype: str,
    contestants: tuple[Contestant, ...],
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Case:
    return Case(
        name=f"[{shape['batch']}, {shape['tokens']}, {shape['vocab']}] {dtype}",
        workload=WORKLOAD,
        parameters={**shape, "dtype": dtype},
        tolerance=TOLERANCES[dtype],
        contestants=contestants,
        ranks=ranks,
        environment=environment or {},
    )


def _faster(peer: str, factor: float, *, ours: str = "measure") -> Goal:
    text = f"at least {factor:g} times less CPU time than {peer}" if factor > 1 else f"never slower than {peer}"
    return Goal(text=text, ours=ours, measure="times_faster", against=peer, at_least=factor)
