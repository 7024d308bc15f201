"""Liger: the GRPO loss from hidden states in chunks (torch), and from logits (Triton). Neither gives an entropy."""

from collections.abc import Callable

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

from benchmarks.harness.parity import Answer
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import BETA, CLIP

Step = Callable[[], Answer]


def from_hidden(work: Hidden, *, compiled: bool = True) -> Step:
    """``LigerFusedLinearGRPOLoss``; ``bnpo`` is its name for the mean over all tokens."""
    mask = torch.ones_like(work.labels)
    head = LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo", temperature=1.0, compiled=compiled
    )

    def step() -> Answer:
        loss, _ = head(
            work.hidden,
            work.weight,
            work.labels,
            mask,
            work.targets.advantages,
            ref_per_token_logps=work.targets.ref_logprobs,
            old_per_token_logps=work.targets.old_logprobs,
        )
        return work.answer(loss, None, None)

    return step


def from_logits(work: Logits) -> Step:
    """``triton_grpo_loss``, which wants one position more than it scores and writes the gradient over the logits."""
    work.leave_room(1)
    mask = torch.ones_like(work.labels)

    def step() -> Answer:
        losses, _, _ = triton_grpo_loss(
            work.buffer,
            work.targets.old_logprobs,
            work.targets.ref_logprobs,
            work.labels,
            work.targets.advantages,
            completion_mask=mask,
            temperature=1.0,
            beta=BETA,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=True,
            loss_type="bnpo",
        )
        loss = losses.mean()
        (gradient,) = torch.autograd.grad(loss, work.buffer)
        return Answer(loss=loss.detach(), gradients={"logits": gradient[:, : work.labels.shape[1]]})

    return step
