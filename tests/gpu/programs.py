"""What a test's rank does with a trainer on its device; tests/mcore/test_precision.py runs the same code on CPU."""

import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klrl.config.recipe import Fp8
from megatron_klrl.mcore import layout
from megatron_klrl.mcore.engine import MegatronEngine
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
    names = ("first_last_bf16", "primary_weights")
    products = Products(fp8=Fp8(fp8), **{name: bool(options.pop(name, False)) for name in names})
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
    """Whether training goes on in one kind of layers from a checkpoint of the other: weights and Adam's moments alike.

    Gradients are drawn, not computed: so that kinds of layers that a device cannot run can be told apart there too.
    """
    with tempfile.TemporaryDirectory() as place:
        how = {"dtype": getattr(torch, dtype)}
        with transformer_engine_can_be_built(), trainer(folder, layers=Layers(writes), **how) as engine:
            drawn_step(engine, seed=1)
            engine.save(Path(place))
            written = engine.weight_checksums()
            drawn_step(engine, seed=2)
            next_ones = engine.weight_checksums()
        with transformer_engine_can_be_built(), trainer(folder, layers=Layers(reads), **how) as engine:
            before = engine.weight_checksums()
            engine.load(Path(place))
            loaded = engine.weight_checksums()
            drawn_step(engine, seed=2)
            return before != written and loaded == written and engine.weight_checksums() == next_ones


@contextmanager
def transformer_engine_can_be_built() -> Iterator[None]:
    """Let its modules believe in a device: they refuse to be built without one, though parameters need none."""
    is_available = torch.cuda.is_available

    def asked_by() -> bool:
        asks = sys._getframe(1).f_globals["__name__"]
        return is_available() or asks.startswith("transformer_engine.pytorch.")

    torch.cuda.is_available = asked_by
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def drawn_step(engine: MegatronEngine, *, seed: int) -> None:
    """An update by gradients that depend on the parameters' names and shapes alone."""
    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            known = layout.general(name).encode()
            generator = torch.Generator().manual_seed(seed + zlib.crc32(known))
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    engine.optim_step()


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
