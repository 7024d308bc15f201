"""One step of a trainer on completions that exist: what every update costs once something has been sampled."""

from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance

REPLAY = "benchmarks.workloads.replay:Replay"
WHOLE = "benchmarks.workloads.whole_step:WholeStep"
GROUP = "score and train"
PADDED = Contestant(
    name="Megatron engine, padded", factory="benchmarks.peers.ours_step:replay", options={"packed": False}, ours=True,
    group=GROUP, note="scores entropy and full-vocabulary KL of every token too, which TRL's loss does not take",
)  # fmt: skip
PACKED = Contestant(
    name="Megatron engine, packed", factory="benchmarks.peers.ours_step:replay", options={"packed": True}, ours=True,
    group=GROUP, note="the same rows one after the other",
)  # fmt: skip
TRL = Contestant(
    name="TRL GRPOTrainer", factory="benchmarks.peers.trl_step:replay", options={"recompute": False}, group=GROUP,
    requires=("trl", "datasets"),
    note="_get_per_token_logps_and_entropies of policy and reference, training_step, clipping, its AdamW; no decoding, "
    "rewards or logs; float32, where it defaults to bfloat16",
)  # fmt: skip
TRL_RECOMPUTE = replace(
    TRL, name="TRL GRPOTrainer, recompute", options={"recompute": True},
    note="with activations computed again in the backward, its default: less memory for one forward more",
)  # fmt: skip
# Four layers of float32 products against float64: 1e-6 per log-probability. The loss is their mean; the norm of the
# gradient is held to the same bound as they are.
TOLERANCE = Tolerance(loss=1e-5, values=1e-5, gradient=1e-5)
CONTESTANTS = (PADDED, TRL, PACKED, TRL_RECOMPUTE)
TRAINER_SETUP = "make setup, then .venv/bin/python benchmarks/run.py step_full"
PHASES = tuple(
    Contestant(
        name=phase, factory=f"benchmarks.peers.ours_phases:{phase}", group=phase, ours=True, requires=("vllm",),
        note=note, install=TRAINER_SETUP,
    )
    for phase, note in (
        ("generate", "vLLM, greedy, every response to the longest length"),
        ("score", "policy and reference; entropy and full-vocabulary KL of every token too"),
        ("train", "advantages, loss, gradient, clipping, Adam"),
        ("sync", "the trainer's weights into the engine's tensors, prefix cache reset; shown to arrive before timing"),
    )
)  # fmt: skip


def step_replay() -> Benchmark:
    """Old and reference log-probabilities, loss, gradient, optimizer; the same tokens and the same loss."""
    return Benchmark(
        name="step_replay",
        summary="a GRPO step on fixed completions of a small Qwen3 on CPU: old and reference scores, update, Adam",
        cases=(_case(sequences=16, tokens=64, layers=4, width=256, vocab=512),),
        quick_cases=(_case(sequences=8, tokens=16, layers=2, width=128, vocab=128),),
        goals=(
            Goal(
                text="at least 1.5 times less CPU time than TRL",
                ours=PADDED.name, measure="times_faster", against=TRL.name, at_least=1.5,
            ),
            Goal(
                text="no more extra memory than TRL",
                ours=PADDED.name, measure="peak_share", against=TRL.name, at_most=1.0,
            ),
        ),
        calls=3,
    )  # fmt: skip


def step_full() -> Benchmark:
    """The same step with both engines, a phase at a time.

    No peer: TRL's side of score and train is `step_replay`, and what samples is another engine.
    """
    return Benchmark(
        name="step_full",
        summary="generate, score, train, sync of a step apart, on a small Qwen3 on CPU, with Megatron-Core and vLLM",
        cases=(_case(PHASES, WHOLE, sequences=16, tokens=64, layers=4, width=256, vocab=512),),
        quick_cases=(_case(PHASES, WHOLE, sequences=8, tokens=16, layers=2, width=128, vocab=128),),
        calls=3,
    )


def _case(contestants: tuple[Contestant, ...] = CONTESTANTS, workload: str = REPLAY, **shape: int) -> Case:
    return Case(
        name=f"{shape['sequences']} x {shape['tokens']} tokens, {shape['layers']} layers of {shape['width']}",
        workload=workload,
        parameters=shape,
        tolerance=TOLERANCE,
        contestants=contestants,
    )
