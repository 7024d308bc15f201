"""A mixture of experts: the same log-probabilities, loss and gradients in every layout, and equal to transformers'."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.mcore import checkpoint
from tests.mcore.test_compat import resume, save_after_some_steps, straight
from tests.mcore.test_layouts import Layout, check, measure, oracle
from tests.support.models import MIXTURE, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

LAYOUTS: dict[str, Layout] = {
    "one_rank": (1, {}),
    "packed": (1, {"tokens_per_microbatch": 40}),
    "ep2": (2, {"expert": 2, "micro_batch_size": 1}),
    "ep2_packed": (2, {"expert": 2, "tokens_per_microbatch": 24}),
    "dp2": (2, {"micro_batch_size": 1}),
    "cp2_ep2": (2, {"context": 2, "expert": 2}),
    "tp2_sp_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
    "pp2_ep2": (4, {"pipeline": 2, "expert": 2, "micro_batch_size": 1}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture on disk."""
    return write_model(tmp_path_factory.mktemp("models") / "mixture", MIXTURE)


def by_file_name(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps a layer's experts in two tensors, and writes each expert under its own names."""
    found = {}
    for name, gradient in gradients.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = gradient
            continue
        layer = name.rsplit(".", 1)[0]
        for expert, part in enumerate(gradient):
            if name.endswith("down_proj"):
                found[f"{layer}.{expert}.down_proj.weight"] = part
            else:
                found[f"{layer}.{expert}.gate_proj.weight"], found[f"{layer}.{expert}.up_proj.weight"] = part.chunk(2)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_transformers(folder: Path, layout: str) -> None:
    logprobs, loss, gradients = oracle(folder)
    gradients = by_file_name(gradients)
    ranks, settings = LAYOUTS[layout]
    for result in run_ranks(ranks, measure, folder, (ranks, settings)):
        check(result, logprobs, loss, gradients)


def weights_of(folder: Path, saved: Path, layout: dict[str, int]) -> dict[str, Tensor]:
    """The model alone, read from a checkpoint."""
    with trainer(folder, with_reference=False, **layout) as engine:
        checkpoint.load_model(saved, engine.chunks, groups=engine.groups)
        return {name: tensor.clone() for name, tensor in engine.export_weights()}


def test_a_checkpoint_loads_in_another_layout(folder: Path, tmp_path: Path) -> None:
    """Experts over two ranks and two stages, then over two ranks; the model alone anywhere; all else is refused."""
    writer = {"pipeline": 2, "expert": 2, "micro_batch_size": 1}
    run_ranks(4, save_after_some_steps, folder, tmp_path, writer)
    expected = run_ranks(1, straight, folder)[0][2:]
    reader = {"expert": 2, "micro_batch_size": 1}
    for (loss, norm), (expected_loss, expected_norm) in zip(
        run_ranks(2, resume, folder, tmp_path, reader)[0], expected, strict=True
    ):
        # as in test_compat: Adam divides by small second moments
        assert loss == pytest.approx(expected_loss, rel=2e-3, abs=2e-4)
        assert norm == pytest.approx(expected_norm, rel=2e-3)
    (on_one,) = run_ranks(1, weights_of, folder, tmp_path, {})
    for found in run_ranks(2, weights_of, folder, tmp_path, {"expert": 2}):
        assert all(torch.equal(found[name], tensor) for name, tensor in on_one.items())
    with pytest.raises(AssertionError, match=r"parallel\.expert"):
        run_ranks(1, resume, folder, tmp_path, {})
