"""The policy loss by hand, and the gradient of the whole RLOO + k1-in-reward objective by enumeration."""

import torch

from megatron_klrl.batch import TrainBatch
from megatron_klrl.losses.policy_loss import PolicyLoss


def rows(**changes: torch.Tensor) -> TrainBatch:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    fields = {
        "tokens": torch.zeros(2, 4, dtype=torch.long),
        "response_mask": mask,
        "advantages": torch.tensor([[0.0, 2.0, 2.0], [-1.0, -1.0, 0.0]]),
        "token_weights": torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]),
        "kl_advantages": torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.0]]),
        "ref_logprobs": None,
        "rollout_logprobs": torch.zeros(2, 3),
    }
    return TrainBatch(**{**fields, **changes})


def test_value_by_hand() -> None:
    logprobs = torch.tensor([[-9.0, -1.0, -2.0], [-3.0, -4.0, -9.0]])
    policy = -(0.5 * 2 * (-1) + 0.5 * 2 * (-2) + 0.5 * (-1) * (-3) + 0.5 * (-1) * (-4))
    kl = -(0.1 * -1 + 0.2 * -2 + 0.3 * -3 + 0.4 * -4) / 2
    assert abs(float(PolicyLoss(num_sequences=2)(logprobs, rows())) - (policy + kl)) < 1e-6


def test_masked_positions_carry_neither_value_nor_gradient() -> None:
    logprobs = torch.tensor([[float("nan"), -1.0, -2.0], [-3.0, -4.0, float("-inf")]], requires_grad=True)
    value = PolicyLoss(num_sequences=2)(logprobs, rows())
    value.backward()
    assert torch.isfinite(value)
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] == 0
    assert logprobs.grad[1, 2] == 0


def test_the_kl_term_ignores_the_aggregation_of_the_reward() -> None:
    """Ten times smaller policy-gradient weights leave the KL term alone: beta means the same in every aggregation."""
    logprobs = torch.tensor([[-9.0, -1.0, -2.0], [-3.0, -4.0, -9.0]])
    loss = PolicyLoss(num_sequences=2)
    zero = torch.zeros(2, 3)
    kl = loss(logprobs, rows(advantages=zero))
    small = loss(logprobs, rows(token_weights=rows().token_weights / 10)) - kl
    full = loss(logprobs, rows()) - kl
    torch.testing.assert_close(10 * small, full, rtol=1e-5, atol=1e-6)


def test_the_loss_side_is_averaged_over_all_sequences_of_the_update() -> None:
    logprobs = torch.tensor([[-9.0, -1.0, -2.0], [-3.0, -4.0, -9.0]])
    with_loss_side = PolicyLoss(
        num_sequences=4, loss_side_kl=lambda lp, b, _: torch.ones_like(lp).where(b.response_mask, 0)
    )
    difference = with_loss_side(logprobs, rows()) - PolicyLoss(num_sequences=4)(logprobs, rows())
    assert abs(float(difference) - 4 / 4) < 1e-6
