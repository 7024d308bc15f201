"""The policy loss by hand, its parts, and what of the recipe reaches it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_klrl.batch import TrainBatch
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from megatron_klrl.rl.surrogates import SURROGATES

LOGPROBS = torch.tensor([[-9.0, -1.0, -2.0], [-3.0, -4.0, -9.0]])
CLIP = "policy/clip_fraction"


def rows(**changes: Tensor) -> TrainBatch:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    values = {
        "tokens": torch.zeros(2, 4, dtype=torch.long),
        "response_mask": mask,
        "advantages": torch.tensor([[0.0, 2.0, 2.0], [-1.0, -1.0, 0.0]]),
        "token_weights": torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]),
        "old_logprobs": torch.tensor([[0.0, -1.5, -2.0], [-3.0, -4.5, 0.0]]),
        "importance_weights": torch.ones(2, 3),
        "kl_advantages": torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.0]]),
        "ref_logprobs": None,
        "rollout_logprobs": torch.zeros(2, 3),
    }
    return TrainBatch(**{**values, **changes})


def policy_loss(**settings: object) -> PolicyLoss:
    return PolicyLoss(**{"num_sequences": 2, "num_tokens": 4, **settings})


CLIPPED = SURROGATES["ppo_clip"].bounded(clip_low=0.2, clip_high=0.2)


def test_value_by_hand() -> None:
    policy = -(0.5 * 2 * (-1) + 0.5 * 2 * (-2) + 0.5 * (-1) * (-3) + 0.5 * (-1) * (-4))
    kl = -(0.1 * -1 + 0.2 * -2 + 0.3 * -3 + 0.4 * -4) / 2
    value, metrics = policy_loss()(LOGPROBS, rows())
    assert abs(float(value) - (policy + kl)) < 1e-6
    assert metrics == {CLIP: 0.0}


def test_clipped_value_and_fraction_by_hand() -> None:
    """Ratios e^.5 (clipped, A > 0), 1, 1 and e^.5 (not clipped, A < 0)."""
    policy = -(0.5 * 2 * 1.2 + 0.5 * 2 * 1 + 0.5 * (-1) * 1 + 0.5 * (-1) * 1.6487213)
    kl = -(0.1 * -1 + 0.2 * -2 + 0.3 * -3 + 0.4 * -4) / 2
    value, metrics = policy_loss(surrogate=CLIPPED, num_tokens=8)(LOGPROBS, rows())
    assert abs(float(value) - (policy + kl)) < 1e-6
    assert metrics == {CLIP: 1 / 8}, "over the tokens of the whole update"


def test_masked_positions_carry_neither_value_nor_gradient() -> None:
    logprobs = torch.tensor([[float("nan"), -1.0, -2.0], [-3.0, -4.0, float("-inf")]], requires_grad=True)
    entropy = torch.tensor([[float("nan"), 1.0, 1.0], [1.0, 1.0, float("inf")]], requires_grad=True)
    value, _ = policy_loss(surrogate=CLIPPED, entropy_bonus=0.1)(logprobs, rows(), entropy=entropy)
    value.backward()
    assert torch.isfinite(value)
    for leaf in (logprobs, entropy):
        assert leaf.grad is not None
        assert leaf.grad[0, 0] == 0
        assert leaf.grad[1, 2] == 0


@pytest.mark.parametrize("name", SURROGATES)
def test_a_blank_row_adds_nothing(name: str) -> None:
    """A microbatch is filled up with copies whose mask is blank; their weights are still there."""
    surrogate = SURROGATES[name].bounded(**({} if name == "reinforce" else {"clip_low": 0.1, "clip_high": 0.1}))
    blank = rows(response_mask=torch.zeros(2, 3, dtype=torch.bool), token_weights=torch.ones(2, 3))
    value, metrics = policy_loss(surrogate=surrogate, entropy_bonus=1.0)(
        LOGPROBS, replace(blank, advantages=torch.ones(2, 3)), entropy=torch.ones(2, 3)
    )
    assert (float(value), float(metrics[CLIP])) == (0.0, 0.0)


def test_the_kl_term_ignores_the_aggregation_of_the_reward() -> None:
    """Ten times smaller policy-gradient weights leave the KL term alone: beta means the same in every aggregation."""
    zero = torch.zeros(2, 3)
    kl, _ = policy_loss()(LOGPROBS, rows(advantages=zero))
    small = policy_loss()(LOGPROBS, rows(token_weights=rows().token_weights / 10))[0] - kl
    full = policy_loss()(LOGPROBS, rows())[0] - kl
    torch.testing.assert_close(10 * small, full, rtol=1e-5, atol=1e-6)


def test_mismatch_weights_multiply_the_policy_gradient_alone() -> None:
    """Token by token, and neither the KL nor the bonus."""
    weights = torch.tensor([[9.0, 0.5, 2.0], [0.0, 3.0, 9.0]])
    entropy = torch.full((2, 3), 0.7)

    def gradient(batch: TrainBatch, bonus: float) -> Tensor:
        leaf, heat = LOGPROBS.clone().requires_grad_(), entropy.clone().requires_grad_()
        value, _ = policy_loss(entropy_bonus=bonus)(leaf, batch, entropy=heat)
        return torch.stack(torch.autograd.grad(value, [leaf, heat], allow_unused=True, materialize_grads=True))

    plain, weighted = gradient(rows(), 0.3), gradient(rows(importance_weights=weights), 0.3)
    of_kl = gradient(rows(advantages=torch.zeros(2, 3)), 0.0)[0]
    torch.testing.assert_close(weighted[0] - of_kl, weights * (plain[0] - of_kl), rtol=1e-6, atol=1e-7)
    assert torch.equal(weighted[1], plain[1])
    assert plain[1].abs().sum() > 0


def test_the_loss_side_is_averaged_over_all_sequences_of_the_update() -> None:
    with_loss_side = policy_loss(
        num_sequences=4, loss_side_kl=lambda lp, b, _: torch.ones_like(lp).where(b.response_mask, 0)
    )
    difference = with_loss_side(LOGPROBS, rows())[0] - policy_loss(num_sequences=4)(LOGPROBS, rows())[0]
    assert abs(float(difference) - 4 / 4) < 1e-6


def test_the_entropy_bonus_by_hand() -> None:
    """Minus the coefficient times the aggregated entropy: 0.5 (.2 + .4 + .6 + .8)."""
    entropy = torch.tensor([[9.0, 0.2, 0.4], [0.6, 0.8, 9.0]], requires_grad=True)
    loss = policy_loss(entropy_bonus=0.1)
    value, _ = loss(LOGPROBS, rows(), entropy=entropy)
    without, _ = policy_loss()(LOGPROBS, rows())
    assert abs(float(value.detach() - without) + 0.1 * 1.0) < 1e-6
    (gradient,) = torch.autograd.grad(value, entropy)
    assert torch.equal(gradient, -0.1 * rows().token_weights)
    assert loss.needs_entropy
    assert not policy_loss().needs_entropy
    with pytest.raises(ValueError, match="entropy is missing"):
        loss(LOGPROBS, rows())


@pytest.mark.parametrize("name", ["reinforce", "ppo_clip", "gspo", "cispo"])
def test_both_parts_add_up_to_the_whole(name: str) -> None:
    """Value, gradient and metrics, exactly: the KL's gradient apart is what the update holds of it."""
    surrogate = SURROGATES[name].bounded(**({} if name == "reinforce" else {"clip_low": 0.1, "clip_high": 0.1}))
    loss = policy_loss(
        surrogate=surrogate,
        entropy_bonus=0.3,
        loss_side_kl=lambda lp, b, kl: (lp.square() + kl).where(b.response_mask, 0.0),
        needs_full_kl=True,
    )
    leaves = [LOGPROBS.clone().requires_grad_(), torch.rand(2, 3).requires_grad_(), torch.rand(2, 3).requires_grad_()]
    found = []
    for batch, part in ((rows(), loss), policy_part(rows(), loss), kl_part(rows(), loss)):
        value, metrics = part(leaves[0], batch, full_kl=leaves[1], entropy=leaves[2])
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        found.append((value.detach(), torch.stack(gradients), metrics))
    (whole, gradient, metrics), (policy, of_policy, ours), (kl, of_kl, theirs) = found
    torch.testing.assert_close(policy + kl, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_policy + of_kl, gradient, rtol=1e-6, atol=1e-6)
    assert metrics.keys() == ours.keys() == theirs.keys() == set(loss.metrics)
    assert all(ours[name] + theirs[name] == metrics[name] for name in metrics)
    assert of_policy[1].abs().sum() == 0, "the policy part has no full-vocabulary KL"
    assert of_kl[2].abs().sum() == 0, "the bonus belongs to the policy part"


def test_parts_need_no_more_than_they_use() -> None:
    loss = policy_loss(
        surrogate=SURROGATES["gspo"].bounded(clip_low=0.1, clip_high=0.1),
        entropy_bonus=0.3,
        loss_side_kl=lambda lp, _, kl: lp + kl,
        needs_full_kl=True,
    )
    policy, kl = policy_part(rows(), loss)[1], kl_part(rows(), loss)[1]
    assert (policy.needs_full_kl, policy.needs_entropy) == (False, True)
    assert (kl.needs_full_kl, kl.needs_entropy) == (True, False)
