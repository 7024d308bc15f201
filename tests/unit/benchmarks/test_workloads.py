"""The float64 answers against autograd, and inputs that cannot make a comparison depend on chance."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.parity import Answer, differences
from benchmarks.harness.ranks import join_ranks
from benchmarks.workloads.hidden import Hidden
from benchmarks.workloads.kl_terms import KLTerms
from benchmarks.workloads.logits import Logits
from benchmarks.workloads.policy_loss import CLIP, PolicyTargets, policy_loss
from tests.support.ranks import run_ranks

SHAPE = {"batch": 2, "tokens": 5, "vocab": 38}


@pytest.mark.usefixtures("alone")
def test_truth_from_logits_is_what_autograd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workloads.logits._BLOCK", 3 * SHAPE["vocab"])
    work = Logits(**SHAPE, dtype="float32")
    leaf = work.logits.detach().double().requires_grad_()
    every = F.log_softmax(leaf, -1)
    logprobs = every.gather(-1, work.labels.unsqueeze(-1)).squeeze(-1)
    loss = policy_loss(logprobs, work.targets)
    found = Answer(
        loss=loss,
        values={"logprobs": logprobs.detach(), "entropy": -(every.exp() * every).sum(-1).detach()},
        gradients={"logits": torch.autograd.grad(loss, leaf)[0]},
    )
    # the stored gradient is float32
    assert max(differences(found, work.truth()).values()) < 1e-7


@pytest.mark.usefixtures("alone")
def test_truth_from_hidden_states_is_what_autograd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workloads.hidden._BLOCK", 3 * SHAPE["vocab"])
    work = Hidden(**SHAPE, width=6, dtype="float32")
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (work.hidden, work.weight))
    every = F.log_softmax(hidden @ weight.T, -1)
    logprobs = every.gather(-1, work.labels.unsqueeze(-1)).squeeze(-1)
    loss = policy_loss(logprobs, work.targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    found = Answer(
        loss=loss,
        values={"logprobs": logprobs.detach(), "entropy": -(every.exp() * every).sum(-1).detach()},
        gradients=dict(zip(("hidden", "weight"), gradients, strict=True)),
    )
    assert max(differences(found, work.truth()).values()) < 1e-7


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_processes_make_the_same_inputs(dtype: str) -> None:
    first, second = (Logits(**SHAPE, dtype=dtype) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.targets.old_logprobs, second.targets.old_logprobs)
    assert not torch.equal(first.logits, Logits(**SHAPE, dtype=dtype, seed=1).logits)


@pytest.mark.usefixtures("alone")
def test_no_rounding_takes_a_token_over_the_clip() -> None:
    work = Logits(batch=16, tokens=128, vocab=512, dtype="float32")
    drift = work.truth().values["logprobs"] - work.targets.old_logprobs
    bounds = torch.tensor([math.log(1 - CLIP), math.log(1 + CLIP)])
    # a bfloat16 log-probability of magnitude 8 to 16 is off by 0.031 at most
    assert (drift.unsqueeze(-1) - bounds).abs().min() > 0.031
    assert (drift > bounds[1]).any()
    assert (drift < bounds[0]).any()
    assert (drift.abs() < 0.1).any()


@pytest.mark.usefixtures("alone")
def test_what_is_written_over_is_restored() -> None:
    work = Logits(**SHAPE, dtype="float32")
    before = work.logits.detach().clone()
    with torch.no_grad():
        work.logits.zero_()
    work.restore()
    assert torch.equal(work.logits, before)


@pytest.mark.usefixtures("alone")
def test_room_for_another_position_keeps_the_logits() -> None:
    work = Logits(**SHAPE, dtype="float32")
    before = work.logits.detach().clone()
    work.leave_room(1)
    assert work.buffer.shape == (2, 6, 38)
    assert work.buffer.requires_grad
    with torch.no_grad():
        work.buffer.zero_()
    work.restore()
    assert torch.equal(work.buffer[:, :5], before)
    assert torch.equal(work.logits, before)


def test_shares_of_the_loss_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 4, generator=generator)
    targets = PolicyTargets.near(logprobs, generator)
    shares = [policy_loss(logprobs.view(-1)[rows], targets, rows=rows) for rows in (slice(0, 5), slice(5, 12))]
    assert float(sum(shares)) == pytest.approx(float(policy_loss(logprobs, targets)), rel=1e-6)


def test_the_loss_is_the_clipped_one_with_k3() -> None:
    targets = PolicyTargets(
        old_logprobs=torch.tensor([[-1.0, -1.0]]),
        ref_logprobs=torch.tensor([[-1.0, -2.0]]),
        advantages=torch.tensor([2.0]),
    )
    logprobs = torch.tensor([[-1.0 + math.log(1.1), -1.0 + math.log(1.5)]], dtype=torch.float64)
    penalties = [math.exp(d) - d - 1 for d in (-math.log(1.1), -1.0 - math.log(1.5))]
    expected = (-1.1 * 2 - 1.2 * 2 + 0.04 * sum(penalties)) / 2
    assert float(policy_loss(logprobs, targets)) == pytest.approx(expected, rel=1e-6)


def test_kl_terms_take_every_leaf_that_the_configuration_has() -> None:
    exact = KLTerms(batch=2, tokens=4, configuration="both/exact/to_go/none").truth()
    sampled = KLTerms(batch=2, tokens=4, configuration="loss/k2/token/none").truth()
    assert set(exact.gradients) == {"logprobs", "full_kl"}
    assert set(sampled.gradients) == {"logprobs"}
    assert all(bool(gradient.any()) for gradient in exact.gradients.values())


def _check_shards(folder: str) -> None:
    whole = torch.load(f"{folder}/whole", weights_only=True)
    rank = int(os.environ["RANK"])
    with join_ranks(rank=rank, ranks=2, meeting=f"{folder}/meeting of two", device="cpu"):
        work = Logits(**SHAPE, dtype="float32")
        here = slice(rank * 19, (rank + 1) * 19)
        assert work.start == rank * 19
        assert torch.equal(work.logits, whole["logits"][..., here])
        assert torch.equal(work.truth().gradients["logits"], whole["gradient"][..., here])


@pytest.mark.usefixtures("alone")
def test_ranks_hold_their_columns_and_their_share_of_the_gradient(tmp_path: Path) -> None:
    work = Logits(**SHAPE, dtype="float32")
    whole = {"logits": work.logits.detach(), "gradient": work.truth().gradients["logits"]}
    torch.save(whole, tmp_path / "whole")
    run_ranks(2, _check_shards, str(tmp_path))
