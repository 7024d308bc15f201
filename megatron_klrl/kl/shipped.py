"""Which trainers ship which configuration, under which flag, as read in their sources of mid-2026. Imports no torch.

A row is listed where the token-level formula and its placement agree. What surrounds the formula in that trainer
(clamps, group-std normalisation, whitening, per-token means) is not part of the row; ``note`` says where it changes
the result, and the audit's second table measures it.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """One trainer that ships a row.

    Attributes:
        library: name of the trainer.
        flag: what a user sets to get the row.
        note: what differs around the formula; empty when nothing does.
    """

    library: str
    flag: str
    note: str = ""


def _verl_reward(kind: str, *, estimator: str = "grpo") -> Shipped:
    note = "summed, then centred and divided by the group's standard deviation" if estimator == "grpo" else "whitened"
    flag = f"algorithm.use_kl_in_reward=True algorithm.kl_penalty={kind} algorithm.adv_estimator={estimator}"
    return Shipped(library="verl", flag=flag, note=note)


def _verl_loss(kind: str, note: str = "") -> Shipped:
    flag = f"actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type={kind}"
    return Shipped(library="verl", flag=flag, note=note)


def _skyrl_reward(kind: str) -> Shipped:
    flag = f"trainer.algorithm.use_kl_in_reward=true trainer.algorithm.kl_estimator_type={kind}"
    return Shipped(library="SkyRL", flag=flag, note="summed, then normalised within the group")


def _skyrl_loss(kind: str, note: str = "mean over tokens") -> Shipped:
    flag = f"trainer.algorithm.use_kl_loss=true trainer.algorithm.kl_estimator_type={kind}"
    return Shipped(library="SkyRL", flag=flag, note=note)


def _openrlhf_reward(kind: str) -> Shipped:
    flag = f"--algo.kl.init_coef 0.01 --algo.kl.estimator {kind}"
    return Shipped(library="OpenRLHF", flag=flag, note="estimate clamped at 10; advantages whitened")


def _openrlhf_loss(kind: str, note: str = "estimate clamped at 10, where its gradient ends") -> Shipped:
    return Shipped(library="OpenRLHF", flag=f"--algo.kl.use_loss --algo.kl.estimator {kind}", note=note)


def _areal(kind: str) -> Shipped:
    return Shipped(library="AReaL", flag=f"actor.kl_ctl=0.1 actor.kl_estimator={kind}", note="estimate clamped at 10")


def _slime_reward(kind: str, estimator: str) -> Shipped:
    flag = f"--kl-coef 0.01 --kl-loss-type {kind} --advantage-estimator {estimator}"
    return Shipped(library="slime", flag=flag, note="ignored with grpo, gspo and cispo")


def _slime_loss(kind: str, extra: str = "", note: str = "") -> Shipped:
    return Shipped(library="slime", flag=f"--use-kl-loss --kl-loss-type {kind}{extra}", note=note)


def _nemo_reward(kind: str) -> Shipped:
    flag = (
        f"loss_fn.use_kl_in_reward=true loss_fn.reference_policy_kl_type={kind} "
        "grpo.adv_estimator.name=reinforce_plus_plus"
    )
    return Shipped(library="NeMo-RL", flag=flag, note="clamped, then whitened with the reward")


def _nemo_loss(kind: str) -> Shipped:
    return Shipped(
        library="NeMo-RL",
        flag=f"loss_fn.reference_policy_kl_type={kind} loss_fn.use_on_policy_kl_approximation=true",
        note="clamped at 20 and 10 unless set to null; without the flag the ratio keeps its gradient but has value 1",
    )


_UNBIASED_KL = " --use-unbiased-kl"
_TRAINER_RATIO = "ratio to the trainer's own recompute, not to the engine"

SHIPPED: Mapping[str, tuple[Shipped, ...]] = {
    "reward/k1/sequence/none": (
        Shipped(library="TRL", flag="RLOOConfig(beta=0.05)"),
        _verl_reward("kl"),
        _skyrl_reward("k1"),
    ),
    "reward/k1/to_go/none": (
        _openrlhf_reward("k1"),
        _areal("k1"),
        _slime_reward("k1", "ppo"),
        _slime_reward("k1", "reinforce_plus_plus"),
        _verl_reward("kl", estimator="reinforce_plus_plus"),
    ),
    "reward/k1/token/none": (_nemo_reward("k1"), _slime_reward("k1", "reinforce_plus_plus_baseline")),
    "reward/k2/sequence/none": (_verl_reward("mse"), _skyrl_reward("k2")),
    "reward/k2/to_go/none": (_openrlhf_reward("k2"), _areal("k2"), _slime_reward("k2", "reinforce_plus_plus")),
    "reward/k2/token/none": (_nemo_reward("k2"),),
    "reward/k3/sequence/none": (_skyrl_reward("k3"), _verl_reward("low_var_kl")),
    "reward/k3/to_go/none": (_openrlhf_reward("k3"), _areal("k3"), _slime_reward("k3", "reinforce_plus_plus")),
    "reward/k3/token/none": (_nemo_reward("k3"),),
    "reward/abs/sequence/none": (_verl_reward("abs"), _skyrl_reward("abs")),
    "loss/k1/token/none": (
        _slime_loss("k1", note="the default type"),
        _verl_loss("kl"),
        _skyrl_loss("k1"),
        _openrlhf_loss("k1", "prints a warning"),
    ),
    "loss/k2/token/none": (
        _verl_loss("mse"),
        _verl_loss("k3+", "straight-through: k3's value, k2's gradient"),
        _slime_loss("k2"),
        _openrlhf_loss("k2"),
        _skyrl_loss("k2"),
    ),
    "loss/k3/token/none": (
        _verl_loss("low_var_kl", "the default type; log-ratio clamped at 20, value at 10, where the gradient ends"),
        Shipped(library="Megatron-RL", flag="--grpo-kl-beta 0.001", note="the default"),
        _skyrl_loss("k3", "the default; clamped at 20 and 10; mean over tokens"),
        Shipped(library="TRL", flag="GRPOConfig(beta=0.04, use_bias_correction_kl=False)", note="mean over tokens"),
        _slime_loss("k3"),
        _openrlhf_loss("k3"),
    ),
    "loss/abs/token/none": (_verl_loss("abs"), _skyrl_loss("abs")),
    "loss/k3/token/token": (
        _slime_loss("k3", _UNBIASED_KL, _TRAINER_RATIO),
        Shipped(library="TRL", flag="GRPOConfig(beta=0.04, use_bias_correction_kl=True)", note="mean over tokens"),
        _nemo_loss("k3"),
    ),
    "loss/k1/token/token": (_slime_loss("k1", _UNBIASED_KL, _TRAINER_RATIO), _nemo_loss("k1")),
    "loss/k2/token/token": (
        Shipped(
            library="OpenRLHF",
            flag="--algo.kl.use_loss --algo.kl.unbiased_gradient",
            note="same gradient, written as detached ratio times k1; the ratio is clamped",
        ),
    ),
    "both/exact/sequence/none": (
        Shipped(library="kl-rb", flag="kl_coef=0.05 (code of arXiv 2504.10637)", note="with a clipped sequence ratio"),
    ),
}
"""Catalogue row name to the trainers that ship it."""
