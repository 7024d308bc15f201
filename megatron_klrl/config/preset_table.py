"""The presets, one after the other: what other trainers and papers do, in this trainer's words. Imports no torch.

Defaults and formulas are those of the libraries' sources of mid-2026; `READ_AT` names the commits.
"""

from megatron_klrl.config.preset import Preset

READ_AT = (
    "verl 1dda039b, TRL f2cd5771, NeMo-RL 7ea279ab, slime 624b824a, OpenRLHF 3c3be623, SkyRL a9564572, "
    "AReaL 4aef98d8, Megatron-LM d98e8a64"
)

_OTHER_UPDATES = (
    "It makes {} updates per batch; here one by default (loop.updates_per_batch), whose ratio is 1 and never clips."
)
_CLAMP = "It clamps the log-ratio at 20 and the estimate at 10, where the gradient ends; here nothing is clamped."
_CLAMP_10 = "It clamps the estimate at 10; here nothing is clamped."
_TOKEN_OBJECTIVE = "It states objective=token, the KL that this form follows; objective=sequence would refuse it."
_TRAINER_RATIO = "Its ratio is to the trainer's own recompute; here to the engine that sampled."
_OWN_BETA = "kl.beta is left to the recipe: {}."
_COMMON_FACTOR = (
    "Its token mean divides reward and KL alike, a factor of the learning rate, so sequence_sum stands for it."
)

_BY_TOKENS = (
    "Its token mean divides KL and reward alike, here it divides the reward only. For its balance divide kl.beta by "
    "the mean response length in tokens; or keep the number and set algorithm.aggregation=sequence_sum, which differs "
    "from its loss by one common factor."
)
_BY_LENGTH = (
    "Its mean over the tokens of each response divides the KL, here it does not. For its balance divide kl.beta by the "
    "mean response length in tokens (exact where responses are equally long)."
)

_FORM = "kl.placement kl.estimator kl.credit kl.correction"
_BETA, _ADVANTAGE, _AGGREGATION = "kl.beta", "algorithm.advantage", "algorithm.aggregation"
_SURROGATE = "algorithm.surrogate"
_CLIP = "algorithm.surrogate algorithm.clip_low algorithm.clip_high"


def _kl(name: str, *, beta: float | None = None, objective: str = "sequence") -> dict[str, object]:
    placement, estimator, credit, correction = name.split("/")
    settings: dict[str, object] = {
        "objective": objective,
        "estimator": estimator,
        "placement": placement,
        "credit": credit,
        "correction": correction,
    }
    return settings if beta is None else {"beta": beta, **settings}


def _algorithm(advantage: str, aggregation: str, **surrogate: object) -> dict[str, object]:
    """Clipped as in PPO. Bounds stand here where they are not the surrogate's own: a user may change the surrogate."""
    return {"advantage": advantage, "surrogate": "ppo_clip", "aggregation": aggregation, **surrogate}


_RLOO = _algorithm("rloo", "sequence_sum", surrogate="reinforce")


def _paper(cell: str, name: str) -> Preset:
    estimator, placement = cell.split("-")
    both = ("Each side carries the full beta; half of it on each would be half the stated KL.",)
    return Preset(
        name=f"paper-{cell}",
        origin="A Comedy of Estimators, arXiv 2512.21852",
        summary=f"{estimator.upper()} in {'reward and loss' if placement == 'both' else placement}, RLOO, on-policy",
        kl=_kl(name, beta=0.1),
        algorithm=_RLOO,
        flags={
            f"{estimator.upper()} in {placement}": _FORM,
            "beta (0, 0.05, 0.1, 0.3 and 1 in the paper)": _BETA,
            "RLOO, 5 completions per prompt (loop.group_size)": f"{_ADVANTAGE} {_SURROGATE} {_AGGREGATION}",
        },
        differences=both if placement == "both" else (),
    )


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="grpo-deepseekmath",
        origin="DeepSeekMath, arXiv 2402.03300",
        summary="GRPO as published: k3 in the loss, standardised rewards",
        kl=_kl("loss/k3/token/none", beta=0.04),
        algorithm=_algorithm("grpo", "sequence_mean"),
        flags={
            "D_KL in the objective, eq. 4": _FORM,
            "beta = 0.04": _BETA,
            "(r - mean(r)) / std(r), 64 completions (loop.group_size)": _ADVANTAGE,
            "min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)": _SURROGATE,
            "1/G sum 1/|o|": _AGGREGATION,
        },
        differences=(
            "The paper does not say which standard deviation; here G - 1 divides.",
            "The paper gives no epsilon; here it is 0.2 (algorithm.clip_low, algorithm.clip_high).",
        ),
        conversion=_BY_LENGTH,
    ),
    Preset(
        name="dr-grpo",
        origin="Dr. GRPO, arXiv 2503.20783",
        summary="no KL, group mean without standard deviation, no length normalisation",
        kl={"beta": 0.0},
        algorithm=_algorithm("dr_grpo", "constant_norm"),
        flags={
            "beta = 0": _BETA,
            "R - mean(R)": _ADVANTAGE,
            "clip 0.2": _SURROGATE,
            "token sum / longest response": _AGGREGATION,
        },
    ),
    Preset(
        name="deepseek-v3.2",
        origin="DeepSeek-V3.2, arXiv 2512.02556",
        summary="importance-weighted k3 in the loss, ratio differentiated",
        kl=_kl("loss/k3/token/token", objective="token"),
        algorithm=_algorithm("dr_grpo", "sequence_mean"),
        flags={
            "unbiased KL estimate, section 3.1": _FORM,
            "beta": _BETA,
            "R - mean(R)": _ADVANTAGE,
            "min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)": _SURROGATE,
            "1/G sum 1/|o|": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("several"),
            "The paper gives no epsilon; here it is 0.2 (algorithm.clip_low, algorithm.clip_high).",
            _OWN_BETA.format("the paper gives no number and weakens it for mathematics"),
            "Off-policy sequence masking, routing replay and the sampling mask are left out.",
            _TRAINER_RATIO,
            _TOKEN_OBJECTIVE,
        ),
        conversion=_BY_LENGTH,
    ),
    Preset(
        name="verl-default",
        origin="verl",
        summary="GRPO with verl's defaults: no KL, no reference",
        kl={"beta": 0.0},
        algorithm=_algorithm("grpo", "token_mean", dual_clip=3.0),
        flags={
            "algorithm.use_kl_in_reward=False actor_rollout_ref.actor.use_kl_loss=False": _BETA,
            "algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=True": _ADVANTAGE,
            "actor_rollout_ref.actor.clip_ratio=0.2": _SURROGATE,
            "actor_rollout_ref.actor.clip_ratio_c=3.0": "algorithm.dual_clip",
            "actor_rollout_ref.actor.loss_agg_mode=token-mean": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("4"),
            "verl's default adv_estimator is gae, which needs a critic; this is its grpo.",
        ),
    ),
    Preset(
        name="verl-kl-loss",
        origin="verl",
        summary="verl's GRPO with its KL loss on, at that loss's defaults",
        kl=_kl("loss/k3/token/none", beta=0.001),
        algorithm=_algorithm("grpo", "token_mean", dual_clip=3.0),
        flags={
            "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=low_var_kl": _FORM,
            "actor_rollout_ref.actor.kl_loss_coef=0.001": _BETA,
            "algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=True": _ADVANTAGE,
            "actor_rollout_ref.actor.clip_ratio=0.2": _SURROGATE,
            "actor_rollout_ref.actor.clip_ratio_c=3.0": "algorithm.dual_clip",
            "actor_rollout_ref.actor.loss_agg_mode=token-mean": _AGGREGATION,
        },
        differences=(_OTHER_UPDATES.format("4"), _CLAMP),
        conversion=_BY_TOKENS,
    ),
    Preset(
        name="trl-grpo",
        origin="TRL GRPOTrainer",
        summary="GRPO with TRL's defaults: KL off; when turned on, importance-weighted k3",
        kl=_kl("loss/k3/token/token", beta=0.0, objective="token"),
        algorithm=_algorithm("grpo", "token_mean"),
        flags={
            "use_bias_correction_kl=True": _FORM,
            "beta=0.0": _BETA,
            'scale_rewards="group"': _ADVANTAGE,
            "epsilon=0.2": _SURROGATE,
            'loss_type="dapo"': _AGGREGATION,
        },
        differences=(
            "Before TRL 1.10 the default was use_bias_correction_kl=False: kl.correction=none.",
            "It adds 1e-4 to the standard deviation, here 1e-6.",
            "vllm_importance_sampling_correction=True is mismatch.correction=sequence_mask mismatch.high=3.",
            _TRAINER_RATIO,
            _TOKEN_OBJECTIVE,
        ),
        conversion=_BY_TOKENS,
    ),
    Preset(
        name="trl-rloo",
        origin="TRL RLOOTrainer",
        summary="leave-one-out on reward less beta times the summed k1",
        kl=_kl("reward/k1/sequence/none", beta=0.05),
        algorithm=_RLOO,
        flags={
            "rewards - beta * kl, kl summed over the completion": _FORM,
            "beta=0.05": _BETA,
            "normalize_advantages=False, num_generations=2 (loop.group_size)": _ADVANTAGE,
            "one ratio per sequence": f"{_SURROGATE} {_AGGREGATION}",
        },
        differences=("It clips that ratio at 0.2; with one update per batch it is 1, the gradient is reinforce's.",),
    ),
    Preset(
        name="nemo-rl-default",
        origin="NeMo-RL",
        summary="k3 in the loss with the score term, standardised rewards",
        kl=_kl("loss/k3/token/token", beta=0.01, objective="token"),
        algorithm=_algorithm("grpo", "token_mean"),
        flags={
            "loss_fn.reference_policy_kl_type=k3": _FORM,
            "loss_fn.reference_policy_kl_penalty=0.01": _BETA,
            "grpo.normalize_rewards=true grpo.use_leave_one_out_baseline=true": _ADVANTAGE,
            "loss_fn.ratio_clip_min=0.2 loss_fn.ratio_clip_max=0.2": _SURROGATE,
            "loss_fn.token_level_loss=true": _AGGREGATION,
        },
        differences=(
            "Its ratio has the value 1 unless use_on_policy_kl_approximation=true; here the value against the engine.",
            "kl.estimator=k2 kl.correction=none has the gradient of its default, sample by sample.",
            "Its mean and standard deviation leave the own reward out; here they are the whole group's.",
            _CLAMP,
            _TOKEN_OBJECTIVE,
        ),
        conversion=_BY_TOKENS,
    ),
    Preset(
        name="slime-unbiased-kl",
        origin="slime",
        summary="importance-weighted k3 in the loss, standardised rewards",
        kl=_kl("loss/k3/token/token", objective="token"),
        algorithm=_algorithm("grpo", "sequence_mean"),
        flags={
            "--use-kl-loss --kl-loss-type k3 --use-unbiased-kl": _FORM,
            "--kl-loss-coef": _BETA,
            "--advantage-estimator grpo": _ADVANTAGE,
            "--eps-clip 0.2": _SURROGATE,
            "no --calculate-per-token-loss": _AGGREGATION,
        },
        differences=(
            _OWN_BETA.format("slime's default, and that of its scripts, is 0"),
            _TRAINER_RATIO,
            _TOKEN_OBJECTIVE,
        ),
        conversion=_BY_LENGTH,
    ),
    Preset(
        name="openrlhf-default",
        origin="OpenRLHF",
        summary="k1 off the reward of the token and of what follows",
        kl=_kl("reward/k1/to_go/none", beta=0.01),
        algorithm=_algorithm("rloo", "sequence_sum"),
        flags={
            "--algo.kl.estimator k1": _FORM,
            "--algo.kl.init_coef 0.01": _BETA,
            "--algo.advantage.estimator rloo": _ADVANTAGE,
            "--actor.eps_clip 0.2": _SURROGATE,
            "token-level loss": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("several"),
            "Its default advantage, gae, needs a critic and whitens KL and reward together; this is its rloo.",
            "The KL has a leave-one-out baseline here and none there: the same expectation.",
            _COMMON_FACTOR,
            _CLAMP_10,
        ),
    ),
    Preset(
        name="openrlhf-kl-loss-k3",
        origin="OpenRLHF",
        summary="k3 in the loss, standardised rewards, as in its DAPO script",
        kl=_kl("loss/k3/token/none", beta=0.001),
        algorithm=_algorithm("grpo", "token_mean", clip_high=0.27),
        flags={
            "--algo.kl.use_loss --algo.kl.estimator k3": _FORM,
            "--algo.kl.init_coef 1e-3": _BETA,
            "--algo.advantage.estimator group_norm": _ADVANTAGE,
            "--actor.eps_clip_low_high 0.2 0.27": f"{_SURROGATE} algorithm.clip_high",
            "token-level loss": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("several"),
            _CLAMP_10 + " Dynamic filtering of groups is left out.",
        ),
        conversion=_BY_TOKENS,
    ),
    Preset(
        name="openrlhf-kl-loss-k2",
        origin="OpenRLHF",
        summary="k2 in the loss, group mean, as in its REINFORCE++-baseline script",
        kl=_kl("loss/k2/token/none", beta=1e-5, objective="token"),
        algorithm=_algorithm("dr_grpo", "token_mean"),
        flags={
            "--algo.kl.use_loss --algo.kl.estimator k2": _FORM,
            "--algo.kl.init_coef 1e-5": _BETA,
            "--algo.advantage.estimator reinforce_baseline": _ADVANTAGE,
            "--actor.eps_clip 0.2": _SURROGATE,
            "token-level loss": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("several"),
            "It divides advantages by their standard deviation over the batch; here nothing does.",
            "--algo.advantage.is_correction_type icepop is mismatch.correction=token_mask.",
            _CLAMP_10,
            _TOKEN_OBJECTIVE,
        ),
        conversion=f"Multiply kl.beta by the standard deviation of advantages over the batch. {_BY_TOKENS}",
    ),
    Preset(
        name="skyrl-default",
        origin="SkyRL",
        summary="k3 in the loss, standardised rewards",
        kl=_kl("loss/k3/token/none", beta=0.001),
        algorithm=_algorithm("grpo", "token_mean"),
        flags={
            "trainer.algorithm.use_kl_loss=true trainer.algorithm.kl_estimator_type=k3": _FORM,
            "trainer.algorithm.kl_loss_coef=0.001": _BETA,
            "trainer.algorithm.advantage_estimator=grpo trainer.algorithm.grpo_norm_by_std=true": _ADVANTAGE,
            "trainer.algorithm.policy_loss_type=regular trainer.algorithm.eps_clip_low=0.2": _SURROGATE,
            "trainer.algorithm.loss_reduction=token_mean": _AGGREGATION,
        },
        differences=(_OTHER_UPDATES.format("4"), _CLAMP),
        conversion=_BY_LENGTH,
    ),
    Preset(
        name="areal-default",
        origin="AReaL",
        summary="k1 off the reward of the token and of what follows",
        kl=_kl("reward/k1/to_go/none", beta=0.1),
        algorithm=_algorithm("rloo", "sequence_sum"),
        flags={
            "actor.kl_estimator=k1": _FORM,
            "actor.kl_ctl=0.1": _BETA,
            "actor.reward_norm=null actor.adv_norm=null": _ADVANTAGE,
            "actor.eps_clip=0.2": _SURROGATE,
            "mean over tokens": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("4"),
            "Its defaults have no baseline; leave-one-out has the same expectation with less noise.",
            "Its penalty is the engine's log-ratio unless recompute_logprob=true; here the trainer's.",
            "Without config.ref its penalty is on log-probabilities alone, no KL; here there is always a reference.",
            _COMMON_FACTOR,
            _CLAMP_10,
        ),
    ),
    Preset(
        name="megatron-rl-default",
        origin="Megatron-LM megatron/rl",
        summary="k3 in the loss, standardised rewards",
        kl=_kl("loss/k3/token/none", beta=0.001),
        algorithm=_algorithm("grpo", "token_mean", clip_low=0.01, clip_high=0.01),
        flags={
            "k3 in calculate_grpo_loss": _FORM,
            "--grpo-kl-beta 0.001": _BETA,
            "(r - mean) / (1e-4 + std), --grpo-group-size 2 (loop.group_size)": _ADVANTAGE,
            "--grpo-clamp-eps-lower 0.01 --grpo-clamp-eps-upper 0.01": _CLIP,
            "token sum / tokens": _AGGREGATION,
        },
        differences=(
            _OTHER_UPDATES.format("2"),
            "Its standard deviation divides by G, plus 1e-4; here by G - 1, plus 1e-6.",
            "Its token mean is taken per microbatch unless losses are per token; here over the batch.",
        ),
        conversion=_BY_TOKENS,
    ),
    Preset(
        name="paper-none",
        origin="A Comedy of Estimators, arXiv 2512.21852",
        summary="no KL, RLOO, on-policy",
        kl={"beta": 0.0},
        algorithm=_RLOO,
        flags={
            "beta = 0": _BETA,
            "RLOO, 5 completions per prompt (loop.group_size)": f"{_ADVANTAGE} {_SURROGATE} {_AGGREGATION}",
        },
    ),
    _paper("k1-reward", "reward/k1/sequence/none"),
    _paper("k1-loss", "loss/k1/token/none"),
    _paper("k3-reward", "reward/k3/sequence/none"),
    _paper("k3-loss", "loss/k3/token/none"),
    _paper("k1-both", "both/k1/sequence/none"),
    _paper("k3-both", "both/k3/sequence/none"),
)
