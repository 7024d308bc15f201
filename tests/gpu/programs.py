"""What a test's rank does with a trainer on its device; tests/mcore/test_precision.py runs the same code on CPU."""

import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klrl.config.recipe import Fp8
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.precision import Products
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer

ROWS, WIDTH, VOCAB = 8, 64, 50
"""Of the batches: tokens that every model of these tests knows."""


@dataclass
class Update:
    """What a scoring and an update give, on the host."""

    logprobs: Tensor
    mask: Tensor
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


def update(folder: Path, layers: str | None, fp8: str, dtype: str, options: dict[str, Any]) -> Update:
    """Score a batch, take its gradient, step."""
    products = Products(fp8=Fp8(fp8), first_last_bf16=bool(options.pop("first_last_bf16", False)))
    how = {"layers": None if layers is None else Layers(layers), "products": products, "dtype": getattr(torch, dtype)}
    with trainer(folder, **how, **options) as engine:
        batch = rollout_batch(rows=ROWS, width=WIDTH, vocab_size=VOCAB)
        batch = on_device(batch, engine.world.device)
        rows = on_device(train_batch(rollout_batch(rows=ROWS, width=WIDTH, vocab_size=VOCAB)), engine.world.device)
        scores = engine.score(batch)
        loss = engine.forward_backward(rows, policy_loss(batch), keep_whole_gradient=True)
        gradients = {name: tensor.cpu().clone() for name, tensor in engine.export_gradients()}
        report = engine.optim_step()
        return Update(
            logprobs=scores.old_logprobs.cpu(),
            mask=batch.response_mask.cpu(),
            loss=loss.loss,
            grad_norm=report.grad_norm,
            gradients=gradients,
        )


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor there."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def carried(folder: Path, writes: str, reads: str, dtype: str) -> bool:
    """Whether a checkpoint of an updated model in one kind of layers is the same model in the other."""
    with tempfile.TemporaryDirectory() as place:
        how = {"dtype": getattr(torch, dtype)}
        with trainer(folder, layers=Layers(writes), **how) as engine:
            batch = on_device(rollout_batch(rows=ROWS, width=WIDTH, vocab_size=VOCAB), engine.world.device)
            rows = on_device(train_batch(rollout_batch(rows=ROWS, width=WIDTH, vocab_size=VOCAB)), batch.tokens.device)
            engine.forward_backward(rows, policy_loss(batch))
            engine.optim_step()
            engine.save(Path(place))
            written = engine.weight_checksums()
        with trainer(folder, layers=Layers(reads), **how) as engine:
            before = engine.weight_checksums()
            engine.load(Path(place))
            return before != written and engine.weight_checksums() == written


def peaks(folder: Path, options: dict[str, Any], width: int) -> dict[str, int]:
    """Most device memory of tensors in each phase of a second step, on rows of a width."""
    with trainer(folder, dtype=torch.bfloat16, **options) as engine:
        batch = on_device(rollout_batch(rows=ROWS, width=width, vocab_size=VOCAB), engine.world.device)
        rows = on_device(train_batch(rollout_batch(rows=ROWS, width=width, vocab_size=VOCAB)), batch.tokens.device)
        found = {}
        for _ in range(2):
            phases = {
                "score": lambda: engine.score(batch),
                "train": lambda: (engine.forward_backward(rows, policy_loss(batch)), engine.optim_step()),
                "sync": lambda: sum(1 for _ in engine.export_weights()),
            }
            for name, run in phases.items():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                run()
                torch.cuda.synchronize()
                found[name] = torch.cuda.max_memory_allocated()
        return found
