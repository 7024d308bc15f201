"""Presets of papers."""

from megatron_klrl.config.preset import Preset
from megatron_klrl.config.preset_table.words import (
    ADVANTAGE,
    AGGREGATION,
    BETA,
    BY_LENGTH,
    FORM,
    OTHER_UPDATES,
    OWN_BETA,
    RLOO,
    SURROGATE,
    TOKEN_OBJECTIVE,
    TRAINER_RATIO,
    algorithm,
    kl,
)


def _paper(cell: str, name: str) -> Preset:
    estimator, placement = cell.split("-")
    both = ("Each side carries the full beta; half of it on each would be half the stated KL.",)
    return Preset(
        name=f"paper-{cell}",
        origin="A Comedy of Estimators, arXiv 2512.21852",
        summary=f"{estimator.upper()} in {'reward and loss' if placement == 'both' else placement}, RLOO, on-policy",
        kl=kl(name, beta=0.1),
        algorithm=RLOO,
        flags={
            f"{estimator.upper()} in {placement}": FORM,
            "beta (0, 0.05, 0.1, 0.3 and 1 in the paper)": BETA,
            "RLOO, 5 completions per prompt (loop.group_size)": f"{ADVANTAGE} {SURROGATE} {AGGREGATION}",
        },
        differences=both if placement == "both" else (),
    )


PAPERS: tuple[Preset, ...] = (
    Preset(
        name="grpo-deepseekmath",
        origin="DeepSeekMath, arXiv 2402.03300",
        summary="GRPO as published: k3 in the loss, standardised rewards",
        kl=kl("loss/k3/token/none", beta=0.04),
        algorithm=algorithm("grpo", "sequence_mean"),
        flags={
            "D_KL in the objective, eq. 4": FORM,
            "beta = 0.04": BETA,
            "(r - mean(r)) / std(r), 64 completions (loop.group_size)": ADVANTAGE,
            "min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)": SURROGATE,
            "1/G sum 1/|o|": AGGREGATION,
        },
        differences=(
            "The paper does not say which standard deviation; here G - 1 divides.",
            "The paper gives no epsilon; here it is 0.2 (algorithm.clip_low, algorithm.clip_high).",
        ),
        conversion=BY_LENGTH,
    ),
    Preset(
        name="dr-grpo",
        origin="Dr. GRPO, arXiv 2503.20783",
        summary="no KL, group mean without standard deviation, no length normalisation",
        kl={"beta": 0.0},
        algorithm=algorithm("dr_grpo", "constant_norm"),
        flags={
            "beta = 0": BETA,
            "R - mean(R)": ADVANTAGE,
            "clip 0.2": SURROGATE,
            "token sum / longest response": AGGREGATION,
        },
    ),
    Preset(
        name="deepseek-v3.2",
        origin="DeepSeek-V3.2, arXiv 2512.02556",
        summary="importance-weighted k3 in the loss, ratio differentiated",
        kl=kl("loss/k3/token/token", objective="token"),
        algorithm=algorithm("dr_grpo", "sequence_mean"),
        flags={
            "unbiased KL estimate, section 3.1": FORM,
            "beta": BETA,
            "R - mean(R)": ADVANTAGE,
            "min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)": SURROGATE,
            "1/G sum 1/|o|": AGGREGATION,
        },
        differences=(
            OTHER_UPDATES.format("several"),
            "The paper gives no epsilon; here it is 0.2 (algorithm.clip_low, algorithm.clip_high).",
            OWN_BETA.format("the paper gives no number and weakens it for mathematics"),
            "Off-policy sequence masking, routing replay and the sampling mask are left out.",
            TRAINER_RATIO,
            TOKEN_OBJECTIVE,
        ),
        conversion=BY_LENGTH,
    ),
    Preset(
        name="dapo",
        origin="DAPO, arXiv 2503.14476",
        summary="no KL, standardised rewards, clip-higher, token mean, dynamic sampling",
        kl={"beta": 0.0},
        algorithm={
            **algorithm("grpo", "token_mean", clip_high=0.28),
            "dynamic_sampling_rounds": 10,
        },
        flags={
            "no KL term, section 2.3": BETA,
            "(R - mean(R)) / std(R), 16 completions (loop.group_size)": ADVANTAGE,
            "epsilon_low 0.2, epsilon_high 0.28": f"{SURROGATE} algorithm.clip_high",
            "token-level loss": AGGREGATION,
            "dynamic sampling": "algorithm.dynamic_sampling_rounds",
        },
        differences=(
            "It samples until the batch is full; here in at most 10 further rounds, then with groups of equal rewards.",
            "Its overlong penalty (4,096 of 20,480 tokens) is algorithm.overlong=penalty with an overlong_buffer.",
            OTHER_UPDATES.format("16"),
        ),
    ),
    Preset(
        name="gspo",
        origin="GSPO, arXiv 2507.18071",
        summary="no KL, standardised rewards, one clipped ratio per response",
        kl={"beta": 0.0},
        algorithm=algorithm("grpo", "sequence_mean", surrogate="gspo"),
        flags={
            "no KL term": BETA,
            "(r - mean) / std": ADVANTAGE,
            "s_i clipped to [1 - 3e-4, 1 + 4e-4]": SURROGATE,
            "1/G sum_i, s_i a geometric mean": AGGREGATION,
        },
        differences=(OTHER_UPDATES.format("4"),),
    ),
    Preset(
        name="cispo",
        origin="MiniMax-M1 (CISPO), arXiv 2506.13585",
        summary="no KL, standardised rewards, clipped importance weights",
        kl={"beta": 0.0},
        algorithm=algorithm("grpo", "token_mean", surrogate="cispo"),
        flags={
            "no KL term": BETA,
            "(R - mean(R)) / std(R)": ADVANTAGE,
            "clip(r, 1 - eps_low, 1 + eps_high), stopped": SURROGATE,
            "token sum / tokens": AGGREGATION,
        },
        differences=(
            "It names no upper bound; here the weight is at most 5 (algorithm.clip_high).",
            OTHER_UPDATES.format("16"),
        ),
    ),
    Preset(
        name="reinforce-pp",
        origin="REINFORCE++, arXiv 2501.03262",
        summary="k1 off the reward-to-go, rewards standardised over the batch",
        kl=kl("reward/k1/to_go/none"),
        algorithm=algorithm("reinforce_pp", "token_mean"),
        flags={
            "r - beta sum of log-ratios from t on": FORM,
            "beta": BETA,
            "(A - mean) / std over the batch": ADVANTAGE,
            "clipped ratio": SURROGATE,
            "mean over tokens": AGGREGATION,
        },
        differences=(
            OWN_BETA.format("the paper gives none"),
            "It standardises reward and KL together; here the KL keeps its weight.",
        ),
    ),
    Preset(
        name="paper-none",
        origin="A Comedy of Estimators, arXiv 2512.21852",
        summary="no KL, RLOO, on-policy",
        kl={"beta": 0.0},
        algorithm=RLOO,
        flags={
            "beta = 0": BETA,
            "RLOO, 5 completions per prompt (loop.group_size)": f"{ADVANTAGE} {SURROGATE} {AGGREGATION}",
        },
    ),
    _paper("k1-reward", "reward/k1/sequence/none"),
    _paper("k1-loss", "loss/k1/token/none"),
    _paper("k3-reward", "reward/k3/sequence/none"),
    _paper("k3-loss", "loss/k3/token/none"),
    _paper("k1-both", "both/k1/sequence/none"),
    _paper("k3-both", "both/k3/sequence/none"),
)
