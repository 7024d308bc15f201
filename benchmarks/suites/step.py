"""One step of a trainer on completions that exist: what every update costs once something has been sampled."""

from dataclasses import replace

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance

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


def _case(**shape: int) -> Case:
    return Case(
        name=f"{shape['sequences']} x {shape['tokens']} tokens, {shape['layers']} layers of {shape['width']}",
        workload="benchmarks.workloads.replay:Replay",
        parameters=shape,
        tolerance=TOLERANCE,
        contestants=CONTESTANTS,
    )
