"""The loss from hidden states and the head, on CPU: whoever stores the logits, and whoever does not."""

from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance

WORKLOAD = "benchmarks.workloads.hidden:Hidden"
WITHOUT = "without entropy"
# Sums over 896 products and 151,936 columns in float32; nobody may be worse than ten times what naive gives.
TOLERANCE = Tolerance(loss=1e-5, values=1e-5, gradient=1e-4)
NO_ENTROPY = "computes the same loss and gradients but no entropy; compared with ours without entropy"

FUSED = Contestant(name="fused_loss", factory="benchmarks.peers.ours:from_hidden_fused", ours=True)
STORED = Contestant(name="measure_hidden", factory="benchmarks.peers.ours:from_hidden", ours=True)
TRL = Contestant(name="TRL, chunked head", factory="benchmarks.peers.trl:from_hidden", requires=("trl",))
VERL = Contestant(
    name="verl, FusedLinearForPPO",
    factory="benchmarks.peers.verl:from_hidden",
    requires=("verl",),
    note="its own 512 tokens a chunk, which is one chunk for fewer",
)
NAIVE = Contestant(name="naive", factory="benchmarks.peers.naive:from_hidden")
NAIVE_COMPILED = replace(NAIVE, name="naive, torch.compile", options={"compiled": True})
LIGER = Contestant(
    name="Liger, chunked GRPO",
    factory="benchmarks.peers.liger:from_hidden",
    group=WITHOUT,
    requires=("liger_kernel", "triton"),
    note=NO_ENTROPY,
)
CCE = Contestant(
    name="cut cross entropy",
    factory="benchmarks.peers.cce:from_hidden",
    options={"implementation": "torch_compile"},
    group=WITHOUT,
    requires=("cut_cross_entropy", "triton"),
    note=f"{NO_ENTROPY}; its torch_compile form on CPU, which stores the logits",
)


def modes(chunk_tokens: int) -> tuple[Contestant, ...]:
    """Ours, with entropy and without: the loss fused, the logits stored, the logits a chunk at a time."""
    chunk, note = {"chunk_tokens": chunk_tokens}, f"in chunks of {chunk_tokens} tokens"
    return (
        replace(FUSED, options=chunk, note=note),
        STORED,
        replace(STORED, name="measure_hidden chunked", options=chunk, note=note),
        replace(FUSED, name="fused_loss, no entropy", options={**chunk, "entropy": False}, group=WITHOUT, note=note),
        replace(STORED, name="measure_hidden, no entropy", options={"entropy": False}, group=WITHOUT),
    )


def contestants(chunk_tokens: int) -> tuple[Contestant, ...]:
    """Ours and peers in turn."""
    fused, stored, chunked, fused_plain, stored_plain = modes(chunk_tokens)
    return (fused, VERL, stored, TRL, chunked, NAIVE, NAIVE_COMPILED, fused_plain, LIGER, stored_plain, CCE)


def head_hidden() -> Benchmark:
    """From few tokens, where the gradient of the head is most of the memory, and from many."""
    sizes = [(4, 32, 64), (8, 128, 256)]
    return Benchmark(
        name="head_hidden",
        summary="the same loss from hidden states [N, H] and the head [151936, H], gradients of both, on CPU",
        cases=tuple(
            _case(batch, tokens, width, 151936, chunk) for batch, tokens, chunk in sizes for width in (256, 896)
        ),
        quick_cases=(_case(4, 16, 64, 8192, 16),),
        goals=(
            Goal(
                text="at most 1.1 times naive's CPU time",
                ours="fused_loss", measure="times_faster", against="naive", at_least=1 / 1.1,
            ),
            Goal(
                text="at least 2 times less CPU time than verl",
                ours="fused_loss", measure="times_faster", against="verl, FusedLinearForPPO", at_least=2,
            ),
            # one per cent for what is per token and for page tables
            *(
                Goal(
                    text=f"extra memory never above naive's: {ours}",
                    ours=ours, measure="peak_share", against="naive", at_most=1.01,
                )
                for ours in ("fused_loss", "measure_hidden", "measure_hidden chunked")
            ),
        ),
        rounds=3,
    )  # fmt: skip


def _case(batch: int, tokens: int, width: int, vocab: int, chunk_tokens: int) -> Case:
    return Case(
        name=f"N {batch * tokens}, H {width}, V {vocab} float32",
        workload=WORKLOAD,
        parameters={"batch": batch, "tokens": tokens, "width": width, "vocab": vocab, "dtype": "float32"},
        tolerance=TOLERANCE,
        contestants=contestants(chunk_tokens),
    )
