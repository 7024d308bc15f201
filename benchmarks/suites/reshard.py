"""Weights from Megatron's layout into an engine's fused tensors: over four ranks, and where one rank holds it all."""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance

WORKLOAD = "benchmarks.workloads.reshard:Reshard"
GROUP = "into the engine's tensors"
EXACT = Tolerance(loss=0.0, values=0.0, gradient=0.0)
ANEW = "the plan, and the memory that it needs, are made in every call: what a first refit takes"

SHARED = Contestant(
    name="plan, shared memory",
    factory="benchmarks.peers.ours_reshard:refit",
    options={"kind": "shared_memory"},
    group=GROUP,
    ours=True,
)
BROADCAST = replace(SHARED, name="plan, broadcast", options={"kind": "broadcast"})
PLANNING = replace(
    SHARED, name="plan made anew, shared memory", options={"kind": "shared_memory", "planned": False}, note=ANEW
)
IN_PROCESS = replace(SHARED, name="plan, in process", options={"kind": "in_process"})
LOOP = Contestant(
    name="per-tensor loop",
    factory="benchmarks.peers.gather_loop:refit",
    group=GROUP,
    note="all-gather over tensor-parallel ranks and broadcast over stages, a parameter at a time; written for this "
    "benchmark after what trainers do, without their exchange of names and shapes",
)
MCORE = Contestant(
    name="Megatron-Core swap",
    factory="benchmarks.peers.megatron_reshard:refit",
    group=GROUP,
    requires=("megatron",),
    note="swap_model_weights over gloo into a Megatron model of one rank that lies in the engine's memory; queries, "
    "keys and values are then put in the engine's order",
)
MCORE_PLANNING = replace(
    MCORE, name="Megatron-Core swap, plan made anew", options={"planned": False}, note=f"the same; {ANEW}"
)
COPY = Contestant(
    name="one copy",
    factory="benchmarks.peers.plain_copy:refit",
    group=GROUP,
    note="the floor, on every rank at once: the same bytes, in the engine's order already, from memory to memory",
)

MB50 = {"hidden": 512, "layers": 4, "ffn": 1536, "vocab": 1024, "dtype": "float32"}
MB200 = {"hidden": 1024, "layers": 6, "ffn": 4096, "vocab": 4096, "dtype": "bfloat16"}
MB500 = {**MB200, "layers": 16}
TINY = {"hidden": 512, "layers": 2, "ffn": 256, "vocab": 128, "dtype": "float32"}
# 7.6 billion parameters, 15.2 GB
B7 = {"hidden": 3584, "layers": 28, "ffn": 18944, "vocab": 152064, "dtype": "bfloat16"}
FOUR_RANKS = {"tensor": 2, "pipeline": 2}


def reshard() -> Benchmark:
    """TP 2 x PP 2 on four ranks; every rank ends with all of the model."""
    everyone = (SHARED, LOOP, MCORE, COPY, BROADCAST, PLANNING, MCORE_PLANNING)
    return Benchmark(
        name="reshard",
        summary="weights from TP 2 x PP 2 (4 ranks, gloo) into fused tensors of a whole model on every rank, on CPU",
        cases=(
            _case("52 MB float32", MB50 | FOUR_RANKS, everyone, ranks=4),
            _case("199 MB bfloat16", MB200 | FOUR_RANKS, everyone, ranks=4),
            _case("503 MB bfloat16", MB500 | FOUR_RANKS, everyone[:4], ranks=4),  # more would not fit into memory
        ),
        quick_cases=(_case("9 MB float32", TINY | FOUR_RANKS, everyone, ranks=4),),
        goals=tuple(
            Goal(
                text=f"at least {bound:g} times less {words} than {peer}",
                ours="plan, shared memory", measure="times_faster", against=against, at_least=bound, clock=clock,
            )
            for bound, against, peer in ((3, LOOP.name, "the per-tensor loop"), (1, MCORE.name, "Megatron-Core"))
            for words, clock in (("CPU time", "seconds"), ("wall time", "wall_s"))
        ),
    )  # fmt: skip


def reshard_match() -> Benchmark:
    """One rank whose layout is the engine's but for fused tensors: what is left is copying."""
    everyone = (IN_PROCESS, COPY, LOOP)
    return Benchmark(
        name="reshard_match",
        summary="weights of one rank into fused tensors of the same model, in one process, on CPU",
        cases=tuple(
            _case(name, size, everyone)
            for name, size in (("52 MB float32", MB50), ("199 MB bfloat16", MB200), ("503 MB bfloat16", MB500))
        ),
        quick_cases=(_case("9 MB float32", TINY, everyone),),
        goals=(
            Goal(
                text="at most twice the CPU time of one copy",
                ours="plan, in process", measure="times_faster", against=COPY.name, at_least=0.5,
            ),
        ),
    )  # fmt: skip


def g_refit_local() -> Benchmark:
    """Qwen2.5-7B's size in one process on a GPU: parts and engine are 15.2 GB each."""
    everyone = (IN_PROCESS, COPY, LOOP)
    name = "15 GB bfloat16"
    return Benchmark(
        name="g_refit_local",
        summary="15.2 GB of bfloat16 weights from Megatron's layout into fused tensors, in one process, on a GPU",
        cases=(_case(name, {**B7, "device": "cuda"}, everyone),),
        quick_cases=(_case("4 MB bfloat16", {**TINY, "dtype": "bfloat16", "device": "cuda"}, everyone),),
        goals=(
            Goal(text="at most 14 ms on an H200", ours="plan, in process", measure="milliseconds", at_most=14),
            Goal(
                text="at least 50 % of the measured copy rate",
                ours="plan, in process", measure="share_of_ceiling", at_least=0.5,
            ),
        ),
    )  # fmt: skip


def _case(name: str, size: Mapping[str, object], contestants: tuple[Contestant, ...], *, ranks: int = 1) -> Case:
    return Case(
        name=name,
        workload=WORKLOAD,
        parameters=size,
        tolerance=EXACT,
        contestants=contestants,
        ranks=ranks,
        shows_wall=ranks > 1,
    )
