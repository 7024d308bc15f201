"""On one GPU: whole steps of the trainer, their share of what the GPU can do, 8-bit products, trainer against engine.

Written without a GPU at hand: docs/status.md says what has run. The same code runs on CPU in step_replay and in tests.
"""

from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance
from benchmarks.suites.step import TRL

# bfloat16 layers against float64: log-probabilities within a few per cent of their norm, gradients more.
_BF16 = Tolerance(loss=5e-2, values=5e-2, gradient=2e-1)
_FP8 = Tolerance(loss=1e-1, values=1e-1, gradient=5e-1)
_STEP = "benchmarks.peers.ours_step:replay"
_SCORE = "benchmarks.peers.ours_score:score"
_TRAINING = "score and train"
_SCORING = "score"
_GPU = {"device": "cuda", "dtype": "bfloat16"}
# Qwen3-0.6B's and Qwen3-4B's depth, width and vocabulary; heads of 64.
B06 = {"layers": 28, "width": 1024, "vocab": 151936, **_GPU}
B4 = {"layers": 36, "width": 2560, "vocab": 151936, **_GPU}
SMALL = {"layers": 2, "width": 256, "vocab": 4096, **_GPU}


def _ours(name: str, *, group: str = _TRAINING, factory: str = _STEP, **options: object) -> Contestant:
    return Contestant(name=name, factory=factory, options={"packed": True, **options}, ours=True, group=group)


BF16 = _ours("Megatron engine, packed")
LOCAL = _ours("Megatron engine, packed, local layers", layers="local")
PADDED = replace(_ours("Megatron engine, padded"), options={"packed": False})


def _case(name: str, contestants: tuple[Contestant, ...], *, tolerance: Tolerance = _BF16, **shape: object) -> Case:
    return Case(
        name=name,
        workload="benchmarks.workloads.replay:Replay",
        parameters=shape,
        tolerance=tolerance,
        contestants=contestants,
    )


def g_step() -> Benchmark:
    """What follows sampling, beside TRL's trainer on the same rows."""
    everyone = (BF16, TRL, PADDED, LOCAL)
    return Benchmark(
        name="g_step",
        summary="a GRPO step on 64 completions of up to 2,048 tokens, 0.6 B parameters, on a GPU",
        cases=(_case("0.6 B, 64 x 2048", everyone, sequences=64, tokens=2048, micro_batch_size=4, **B06),),
        quick_cases=(_case("small, 8 x 64", everyone, sequences=8, tokens=64, micro_batch_size=4, **SMALL),),
        goals=(
            Goal(
                text="at least twice TRL's tokens a second",
                ours=BF16.name, measure="times_faster", against=TRL.name, at_least=2,
            ),
            Goal(
                text="at most half of TRL's extra memory",
                ours=BF16.name, measure="peak_share", against=TRL.name, at_most=0.5,
            ),
        ),
        rounds=3,
    )  # fmt: skip


def g_train_mfu() -> Benchmark:
    """The share of the GPU's own measured rate of products that a step reaches, counted in operations."""
    both = (BF16, LOCAL)
    sizes = {"0.6 B, 16 x 1024": B06, "4 B, 16 x 1024": B4}
    return Benchmark(
        name="g_train_mfu",
        summary="share of the measured product rate in a step on packed rows of 16 k tokens, 0.6 B and 4 B, on a GPU",
        cases=tuple(
            _case(name, both, sequences=16, tokens=1024, micro_batch_size=16, **size) for name, size in sizes.items()
        ),
        quick_cases=(_case("small, 8 x 64", both, sequences=8, tokens=64, **SMALL),),
        goals=(
            _share("at least 37 % of the measured rate (30 % of the data sheet's) at 0.6 B", 0.37, "0.6 B, 16 x 1024"),
            _share("at least 50 % of the measured rate at 4 B", 0.5, "4 B, 16 x 1024"),
        ),
        rounds=3,
    )


def _share(text: str, bound: float, case: str) -> Goal:
    return Goal(text=text, ours=BF16.name, measure="share_of_ceiling", at_least=bound, cases=(case,))


def g_fp8() -> Benchmark:
    """A step with 8-bit products beside the same step in bf16; parity says how far log-probabilities move."""
    formats = tuple(
        replace(_ours(f"Megatron engine, fp8 {name}", fp8=name), gradient_tolerance=_FP8.gradient)
        for name in ("tensorwise", "delayed", "blockwise")
    )
    everyone = (*formats, BF16)
    return Benchmark(
        name="g_fp8",
        summary="a step with 8-bit products (tensorwise, delayed, blockwise) and in bf16, 4 B parameters, on a GPU",
        cases=(
            _case("4 B, 16 x 1024", everyone, tolerance=_FP8, sequences=16, tokens=1024, micro_batch_size=16, **B4),
        ),
        quick_cases=(_case("small, 8 x 64", everyone, tolerance=_FP8, sequences=8, tokens=64, **SMALL),),
        goals=(
            Goal(
                text="at least 1.2 times faster than bf16",
                ours=formats[0].name, measure="times_faster", against=BF16.name, at_least=1.2,
            ),
        ),
        rounds=3,
    )  # fmt: skip


def g_mismatch() -> Benchmark:
    """How far trainer and engine each are from the float64 log-probabilities of the same 1,024 tokens."""
    everyone = (
        _ours("trainer, bf16", group=_SCORING, factory=_SCORE),
        _ours("trainer, fp8 tensorwise", group=_SCORING, factory=_SCORE, fp8="tensorwise"),
        _engine("engine, bf16"),
        _engine("engine, fp8 weights", quantised=True),
    )
    shape = {"sequences": 4, "tokens": 256}
    return Benchmark(
        name="g_mismatch",
        summary="log-probabilities of trainer and vLLM engine, bf16 and 8 bits, against float64, 0.6 B, on a GPU",
        cases=(_scoring("0.6 B, 4 x 256", everyone, **shape, **B06),),
        quick_cases=(_scoring("small, 4 x 64", everyone, **{**shape, "tokens": 64}, **SMALL),),
        rounds=3,
    )


def _engine(name: str, **options: object) -> Contestant:
    return Contestant(
        name=name,
        factory="benchmarks.peers.ours_engine:score",
        options=options,
        ours=True,
        group=_SCORING,
        note="prompt log-probabilities, prefill alone",
    )


def _scoring(name: str, contestants: tuple[Contestant, ...], **shape: object) -> Case:
    return replace(_case(name, contestants, tolerance=_FP8, **shape), workload="benchmarks.workloads.scoring:Scoring")
