"""On one GPU: log-probability and entropy alone, the loss from logits, the loss from hidden states."""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance
from benchmarks.suites import head, logits

# TRL's published shape: bfloat16 logits of 8 sequences of 1,024 tokens over Qwen's vocabulary.
SHAPE = {"batch": 8, "tokens": 1024, "vocab": 151936, "dtype": "bfloat16", "device": "cuda"}
SMALL = {"batch": 2, "tokens": 128, "vocab": 16384, "dtype": "bfloat16", "device": "cuda"}
# The products are rounded to bfloat16 as everyone's are, 0.4 % of a logit; the probabilities follow.
HEAD_TOLERANCE = Tolerance(loss=5e-2, values=2e-2, gradient=8e-2)
CHUNK_TOKENS = 1024


def g_logp_entropy() -> Benchmark:
    """Forward only, as when old and reference log-probabilities are scored."""
    contestants = (
        logits.MEASURE,
        logits.TRL,
        replace(logits.TRL, name="TRL, torch functions", options={"torch_path": True}),
        logits.VERL_COMPILED,
        logits.NAIVE_COMPILED,
        replace(logits.PLAIN),
        Contestant(
            name="Liger, selective log-softmax",
            factory="benchmarks.peers.liger_scores:from_logits",
            group=logits.WITHOUT,
            requires=("liger_kernel", "triton"),
            note="no entropy; compared with ours without entropy",
        ),
    )
    return Benchmark(
        name="g_logp_entropy",
        summary="log-probability and entropy, forward only, from bfloat16 logits on a GPU",
        cases=(_from_logits(SHAPE, contestants, train=False),),
        quick_cases=(_from_logits(SMALL, contestants, train=False),),
        goals=(
            Goal(text="at most 0.72 ms on an H200", ours="measure", measure="milliseconds", at_most=0.72),
            _ceiling("measure", "at least 80 % of the measured copy rate", 0.8),
            Goal(
                text="at least 10 times faster than TRL's torch functions",
                ours="measure", measure="times_faster", against="TRL, torch functions", at_least=10,
            ),
        ),
        rounds=10,
        calls=10,
    )  # fmt: skip


def g_loss_fwd_bwd() -> Benchmark:
    """Forward and backward, the gradient over the logits for those who can."""
    contestants = (
        logits.OVERWRITE,
        logits.TRL,
        logits.MEASURE,
        logits.NAIVE_COMPILED,
        logits.PLAIN_OVERWRITE,
        Contestant(
            name="Liger, Triton GRPO",
            factory="benchmarks.peers.liger:from_logits",
            group=logits.WITHOUT,
            requires=("liger_kernel", "triton"),
            note="the loss is inside; the gradient overwrites the logits; no entropy",
        ),
        logits.MCORE,
        logits.MCORE_FUSED,
    )
    return Benchmark(
        name="g_loss_fwd_bwd",
        summary="log-probability, entropy without gradient, clipped loss and 0.04 k3, from bfloat16 logits on a GPU",
        cases=(_from_logits(SHAPE, contestants, train=True),),
        quick_cases=(_from_logits(SMALL, contestants, train=True),),
        goals=(
            Goal(text="at most 2.2 ms on an H200", ours="measure overwrite", measure="milliseconds", at_most=2.2),
            _ceiling("measure overwrite", "at least 79 % of the measured copy rate", 0.79),
            Goal(
                text="at most 1 MiB of extra memory",
                ours="measure overwrite", measure="peak_over_input", at_most=2**20 / (8 * 1024 * 151936 * 2),
            ),
            Goal(
                text="at least 3 times faster than Megatron-Core fused",
                ours="measure overwrite, no entropy", measure="times_faster",
                against="Megatron-Core fused cross entropy", at_least=3,
            ),
        ),
        rounds=10,
        calls=5,
    )  # fmt: skip


def g_head() -> Benchmark:
    """From hidden states: (a) is Liger's published shape, (b) Qwen2.5-7B's head."""
    shapes = {
        "a": {"batch": 4, "tokens": 1024, "width": 4096, "vocab": 131072},
        "b": {"batch": 8, "tokens": 1024, "width": 3584, "vocab": 151936},
    }
    small = {"batch": 2, "tokens": 128, "width": 256, "vocab": 16384}
    names = {
        key: f"({key}) N {size['batch'] * size['tokens']}, H {size['width']}, V {size['vocab']} bfloat16"
        for key, size in shapes.items()
    }
    return Benchmark(
        name="g_head",
        summary="the same loss from bfloat16 hidden states and head, gradients of both, on a GPU",
        cases=tuple(_from_hidden(names[key], size, CHUNK_TOKENS) for key, size in shapes.items()),
        quick_cases=(_from_hidden("small bfloat16", small, 64),),
        goals=(
            *_head_times("fused_loss", "three products", {names["a"]: 19.5, names["b"]: 39.5}),
            *_head_times("measure_hidden chunked", "four products", {names["a"]: 26.0, names["b"]: 52.0}),
            _ceiling("fused_loss", "at least 86 % of the measured GEMM rate", 0.86),
            Goal(
                text="at least 1.9 times faster than verl's Triton head",
                ours="fused_loss", measure="times_faster", against="verl, Triton head", at_least=1.9,
            ),
        ),
        rounds=5,
        calls=3,
    )  # fmt: skip


def _head_times(ours: str, how: str, bounds: Mapping[str, float]) -> tuple[Goal, ...]:
    return tuple(
        Goal(
            text=f"{how}: at most {bound} ms on an H200",
            ours=ours,
            measure="milliseconds",
            at_most=bound,
            cases=(case,),
        )
        for case, bound in bounds.items()
    )


def _head_contestants(chunk_tokens: int) -> tuple[Contestant, ...]:
    fused, stored, chunked, fused_plain, stored_plain = head.modes(chunk_tokens)
    triton = Contestant(
        name="verl, Triton head", factory="benchmarks.peers.verl_triton:from_hidden", requires=("verl", "triton")
    )
    cce = replace(head.CCE, options={"implementation": "cce"}, note="no entropy; Triton kernels, nothing filtered")
    return (
        fused, triton, stored, head.TRL, chunked, head.VERL, head.NAIVE_COMPILED, fused_plain, head.LIGER,
        stored_plain, cce,
    )  # fmt: skip


def _from_logits(shape: Mapping[str, object], contestants: tuple[Contestant, ...], *, train: bool) -> Case:
    return Case(
        name=f"[{shape['batch']}, {shape['tokens']}, {shape['vocab']}] {shape['dtype']}",
        workload=logits.WORKLOAD,
        parameters={**shape, "train": train},
        tolerance=logits.TOLERANCES["bfloat16"],
        contestants=contestants,
    )


def _from_hidden(name: str, size: Mapping[str, int], chunk_tokens: int) -> Case:
    return Case(
        name=name,
        workload=head.WORKLOAD,
        parameters={**size, "dtype": "bfloat16", "device": "cuda"},
        tolerance=HEAD_TOLERANCE,
        contestants=_head_contestants(chunk_tokens),
    )


def _ceiling(ours: str, text: str, share: float) -> Goal:
    return Goal(text=text, ours=ours, measure="share_of_ceiling", at_least=share)
