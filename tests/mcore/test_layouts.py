"""Log-probabilities, loss and gradients are the same in every layout, and equal to transformers'."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_klrl.batch import RolloutBatch, TrainBatch
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.kl import KLConfig, loss_terms
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from megatron_klrl.mcore.model import unwrap
from tests.support.models import FAMILIES, token_logprobs, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer

# float32; sums over 32 wide layers in another order. Log-probabilities here lie in 0..10, gradients in 0..3.
LOGPROB_ATOL = 2e-5
# of each tensor's gradient as a whole: single entries can cancel to nearly nothing and keep the rounding of their terms
GRADIENT_ERROR = 1e-5


Layout = tuple[int, dict[str, Any]]
"""Ranks, and what ``tests.support.trainer.trainer`` is told of them."""

LAYOUTS: dict[str, Layout] = {
    "one_rank": (1, {}),
    "one_microbatch": (1, {"micro_batch_size": 6, "head_chunk_tokens": None}),
    "packed": (1, {"tokens_per_microbatch": 24}),
    "recompute": (1, {"recompute": Recompute.FULL}),
    "recompute_attention_packed": (1, {"recompute": Recompute.ATTENTION, "tokens_per_microbatch": 40}),
    "tp2": (2, {"tensor": 2}),
    "tp2_packed": (2, {"tensor": 2, "tokens_per_microbatch": 30}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_packed": (2, {"pipeline": 2, "tokens_per_microbatch": 20}),
    "pp2_interleaved": (2, {"pipeline": 2, "virtual": 2}),
    "pp2_interleaved_packed": (2, {"pipeline": 2, "virtual": 2, "tokens_per_microbatch": 40}),
    "cp2": (2, {"context": 2}),
    "cp2_packed": (2, {"context": 2, "tokens_per_microbatch": 40}),
    "dp2": (2, {"micro_batch_size": 1}),
    "dp2_blank_rows": (2, {"micro_batch_size": 4}),
    "dp2_packed": (2, {"tokens_per_microbatch": 17}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "tp2_sp_packed_recompute": (
        2,
        {"tensor": 2, "sequence": True, "tokens_per_microbatch": 33, "recompute": Recompute.FULL},
    ),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2_dp2": (4, {"tensor": 2}),
    "tp2_sp_cp2_packed": (4, {"tensor": 2, "context": 2, "sequence": True, "tokens_per_microbatch": 30}),
    "pp2_cp2": (4, {"pipeline": 2, "context": 2}),
}


@dataclass
class Result:
    """What a rank reports."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    full_kl: Tensor
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights_before: dict[str, Tensor]


def measure(folder: Path, layout: Layout) -> Result:
    """Score, take the gradient and one step in a layout."""
    with trainer(folder, **layout[1]) as engine:
        batch = rollout_batch()
        scores = engine.score(batch)
        before = {name: tensor.clone() for name, tensor in engine.export_weights()}
        loss = engine.forward_backward(train_batch(batch), policy_loss(batch), keep_whole_gradient=True)
        gradients = {name: tensor.clone() for name, tensor in engine.export_gradients()}
        update = engine.optim_step()
        assert scores.ref_logprobs is not None
        assert scores.full_kl is not None
        return Result(
            old_logprobs=scores.old_logprobs,
            ref_logprobs=scores.ref_logprobs,
            full_kl=scores.full_kl,
            loss=loss.loss,
            grad_norm=update.grad_norm,
            gradients=gradients,
            weights_before=before,
        )


def oracle(folder: Path) -> tuple[Tensor, float, dict[str, Tensor]]:
    """transformers' log-probabilities, loss and gradients, tied parameters under one name."""
    batch = rollout_batch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(batch.tokens[:, :-1]).logits
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    loss, _ = policy_loss(batch)(logprobs, train_batch(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach().where(batch.response_mask, 0.0), loss.item(), gradients


def check(result: Result, logprobs: Tensor, loss: float, gradients: dict[str, Tensor]) -> None:
    """A rank's results are the oracle's."""
    torch.testing.assert_close(result.old_logprobs, logprobs, rtol=0, atol=LOGPROB_ATOL)
    torch.testing.assert_close(result.ref_logprobs, logprobs, rtol=0, atol=LOGPROB_ATOL)
    assert result.full_kl.abs().max() < 1e-5, "policy and reference are the same model"
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (result.gradients[name] - gradient).norm() / gradient.norm()
        assert error < GRADIENT_ERROR, f"{name}: relative error {error:.1e}"
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, config) for name, config in FAMILIES.items()}


QUICK = ("one_rank", "tp2", "pp2", "tp2_pp2")
"""Layouts of the second family that every test run takes; the first takes all."""


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3_tied", layout) for layout in LAYOUTS]
    + [pytest.param("llama31_untied", layout, marks=() if layout in QUICK else pytest.mark.long) for layout in LAYOUTS],
)
def test_every_layout_equals_transformers(folders: dict[str, Path], family: str, layout: str) -> None:
    logprobs, loss, gradients = oracle(folders[family])
    for result in run_ranks(LAYOUTS[layout][0], measure, folders[family], LAYOUTS[layout]):
        check(result, logprobs, loss, gradients)


@pytest.mark.parametrize("layout", ["one_rank", "tp2", "pp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_folder_in_and_out(folders: dict[str, Path], family: str, layout: str) -> None:
    """Loading a folder and streaming it out again gives the same tensors bit for bit, and the model is the same."""
    written = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).state_dict()
    batch = rollout_batch()
    expected = token_logprobs(folders[family], batch.tokens).where(batch.response_mask, 0.0)
    for result in run_ranks(LAYOUTS[layout][0], measure, folders[family], LAYOUTS[layout]):
        for name, tensor in result.weights_before.items():
            assert torch.equal(tensor, written[name]), name
        missing = set(written) - set(result.weights_before)
        assert missing <= {"lm_head.weight"}, "only a tied head may be left out"
        torch.testing.assert_close(result.old_logprobs, expected, rtol=0, atol=LOGPROB_ATOL)


def rotary_frequencies(folder: Path) -> Tensor:
    """Megatron's rotary frequencies for a model folder."""
    with trainer(folder, with_reference=False) as engine:
        return unwrap(engine.chunks[0]).rotary_pos_emb.inv_freq


def test_llama31_rotary_scaling_equals_transformers(folders: dict[str, Path]) -> None:
    """Short rows hardly show the scaling of low frequencies, so the frequencies themselves are compared."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama31_untied"], dtype=torch.float32)
    expected = model.model.rotary_emb.inv_freq
    unscaled = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert not torch.allclose(expected, unscaled, rtol=1e-2), "this configuration must exercise the scaling"
    (found,) = run_ranks(1, rotary_frequencies, folders["llama31_untied"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def bf16_scores(folder: Path, tensor: int) -> tuple[Tensor, float]:
    """Log-probabilities and the loss's gradient norm in bf16."""
    with trainer(folder, tensor=tensor, dtype=torch.bfloat16) as engine:
        batch = rollout_batch()
        scores = engine.score(batch)
        engine.forward_backward(train_batch(batch), policy_loss(batch))
        return scores.old_logprobs, engine.optim_step().grad_norm


@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_stays_near_float32(folders: dict[str, Path], tensor: int) -> None:
    """bf16 keeps 8 bits: logits of size 10 are off by up to 0.04 each layer; float32 sums keep the mean error small."""
    logprobs, _, gradients = oracle(folders["qwen3_tied"])
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    for found, grad_norm in run_ranks(tensor, bf16_scores, folders["qwen3_tied"], tensor):
        assert (found - logprobs).abs().mean() < 0.05
        assert (found - logprobs).abs().max() > 1e-5, "this must really run in bf16"
        assert grad_norm == pytest.approx(norm, rel=0.1)


@dataclass
class SplitResult:
    """The gradient's parts, and the gradient itself taken both ways."""

    loss: float
    whole_loss: float
    kl_norm: float
    cosine: float
    in_parts: dict[str, Tensor]
    at_once: dict[str, Tensor]


def split_and_whole(folder: Path, layout: Layout) -> SplitResult:
    """Take the same gradient in two parts and at once."""
    with trainer(folder, **layout[1]) as engine:
        batch = rollout_batch()
        split = engine.split_gradient(train_batch(batch), policy_loss(batch))
        in_parts = {name: tensor.clone() for name, tensor in engine.export_gradients()}
        loss = engine.forward_backward(train_batch(batch), policy_loss(batch), keep_whole_gradient=True)
        at_once = {name: tensor.clone() for name, tensor in engine.export_gradients()}
        return SplitResult(split.loss, loss.loss, split.kl_norm, split.cosine, in_parts, at_once)


@pytest.mark.parametrize("layout", ["one_rank", "tp2_pp2", "dp2"])
def test_gradient_in_two_parts_is_the_gradient(folders: dict[str, Path], layout: str) -> None:
    """Norm and angle are those of autograd through transformers, and the parts add up to the whole."""
    batch = rollout_batch()
    model = AutoModelForCausalLM.from_pretrained(folders["qwen3_tied"], dtype=torch.float32)
    logprobs = torch.log_softmax(model(batch.tokens[:, :-1]).logits, -1)
    logprobs = logprobs.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    flat = []
    for part in (policy_part, kl_part):
        rows, loss = part(train_batch(batch), policy_loss(batch))
        gradients = torch.autograd.grad(loss(logprobs, rows)[0], list(model.parameters()), retain_graph=True)
        flat.append(torch.cat([g.flatten() for g in gradients]).double())
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    for result in run_ranks(LAYOUTS[layout][0], split_and_whole, folders["qwen3_tied"], LAYOUTS[layout]):
        assert result.loss == pytest.approx(result.whole_loss, rel=1e-5)
        assert result.kl_norm == pytest.approx(float(flat[1].norm()), rel=1e-4)
        assert result.cosine == pytest.approx(cosine, abs=1e-4)
        for name, gradient in result.at_once.items():
            assert (result.in_parts[name] - gradient).norm() <= GRADIENT_ERROR * gradient.norm(), name


def exact_gradient(folder: Path, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the full-vocabulary KL in the loss, with the policy moved off its reference."""
    with trainer(folder, **layout[1]) as engine:
        batch = rollout_batch()
        engine.forward_backward(train_batch(batch), policy_loss(batch))
        engine.optim_step()
        weights = {name: tensor.clone() for name, tensor in engine.export_weights()}
        rows = replace(train_batch(batch), advantages=torch.zeros(batch.response_mask.shape))
        rows = replace(rows, kl_advantages=torch.zeros(batch.response_mask.shape))
        engine.forward_backward(rows, exact_loss(batch), keep_whole_gradient=True)
        scores = engine.score(batch)
        assert scores.full_kl is not None
        gradients = {name: tensor.clone() for name, tensor in engine.export_gradients()}
        return scores.full_kl, gradients | {f"weight/{name}": tensor for name, tensor in weights.items()}


def exact_loss(batch: RolloutBatch) -> PolicyLoss:
    """0.3 nats of full-vocabulary KL, own token."""
    config = KLConfig(beta=0.3, estimator="exact", placement="loss", credit="token", objective="token")

    def loss_side(logprobs: Tensor, rows: TrainBatch, full_kl: Tensor | None) -> Tensor:
        return loss_terms(logprobs, logprobs.detach(), rows.response_mask, config=config, full_kl=full_kl)

    return replace(policy_loss(batch), loss_side_kl=loss_side, needs_full_kl=True)


@pytest.mark.parametrize("layout", ["one_rank", "tp2_sp", "pp2", "dp2", "tp2_pp2"])
@pytest.mark.parametrize("family", ["qwen3_tied", "qwen2_untied"])
def test_full_vocabulary_kl_in_the_loss_equals_transformers(folders: dict[str, Path], family: str, layout: str) -> None:
    """The reference enters by its hidden states and head only; value and gradient are autograd's on whole logits."""
    batch = rollout_batch()
    for full_kl, found in run_ranks(LAYOUTS[layout][0], exact_gradient, folders[family], LAYOUTS[layout]):
        model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
        reference = torch.log_softmax(model(batch.tokens[:, :-1]).logits, -1).detach()
        moved = {name.removeprefix("weight/"): w for name, w in found.items() if name.startswith("weight/")}
        model.load_state_dict(moved, strict=False)
        policy = torch.log_softmax(model(batch.tokens[:, :-1]).logits, -1)
        expected = (policy.exp() * (policy - reference)).sum(-1).where(batch.response_mask, 0.0)
        torch.testing.assert_close(full_kl, expected.detach(), rtol=1e-4, atol=1e-5)
        assert expected.max() > 0.01, "the policy must have moved"
        (0.3 * expected.sum() / batch.tokens.shape[0]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 10 * GRADIENT_ERROR, f"{name}: relative error {error:.1e}"  # two steps of rounding, not one
