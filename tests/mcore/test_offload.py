"""Optimizer state and gradients out and back: values bit for bit, nobody's view lost, nothing kept behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.mcore.engine import MegatronEngine
from megatron_klrl.mcore.offload import HostCopies
from megatron_klrl.runtime import world as ranks
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer_in


@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
def test_storages_come_back_bit_for_bit_and_views_with_them(block_bytes: int) -> None:
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    row, other = whole[2], torch.tensor([float("nan"), -0.0]).to(torch.bfloat16)
    before, bits = whole.clone(), other.view(torch.int16).clone()
    copies = HostCopies(block_bytes=block_bytes)
    for _ in range(2):
        copies.move_out([whole, row])
        copies.move_out([other])
        assert (whole.untyped_storage().nbytes(), other.untyped_storage().nbytes()) == (0, 0)
        assert 0 <= copies.host_bytes - (6 * 4 * 4 + 2 * 2) < block_bytes, "one copy, whatever the tensors' sizes"
        copies.move_back()
        assert torch.equal(whole, before)
        assert torch.equal(row, before[2])
        assert torch.equal(other.view(torch.int16), bits)
    row.fill_(1.0)
    assert torch.equal(whole[2], torch.ones(4)), "still a view"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), FAMILIES["qwen2_tied"])


def updates(
    folder: Path, dtype: torch.dtype, split: str, to: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Weights after three updates, without offloading and with; and bytes on the device while state is out."""
    layout = {split: 2, "with_reference": False, "dtype": dtype}
    held: list[int] = []
    run_on_cpu()
    world = ranks.join(timeout_s=60)
    with trainer_in(world, folder, **layout) as engine:
        plain = three_updates(engine, lambda: None)
        engine.close()

    def away() -> None:
        engine.offload()
        engine.offload()  # a second call changes nothing
        held.append(bytes_of_state(engine))
        list(engine.export_weights())  # the weights are needed for the engine all the while
        if len(held) == 2:
            (to / "checkpoint").mkdir(exist_ok=True)
            engine.save(to / "checkpoint")  # brings the state back by itself

    with trainer_in(world, folder, **layout) as engine:
        offloaded = three_updates(engine, away)
        engine.close()
    ranks.leave()
    return plain, offloaded, held


def three_updates(engine: MegatronEngine, between: Callable[[], None]) -> dict[str, Tensor]:
    batch = rollout_batch()
    for _ in range(3):
        between()
        engine.forward_backward(train_batch(batch), policy_loss(batch))
        engine.optim_step()
    return {name: tensor.clone() for name, tensor in engine.export_weights()}


def bytes_of_state(engine: MegatronEngine) -> int:
    """Moments and gradients; float32 parameters of the optimizer are the model's own."""
    parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    moments = [value for part in parts for state in part.optimizer.state.values() for value in state.values()]
    gradients = [parameter.main_grad for chunk in engine.chunks for parameter in chunk.parameters()]
    return sum(tensor.untyped_storage().nbytes() for tensor in (*moments, *gradients))


@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, "pipeline"), (torch.bfloat16, "tensor")])
def test_training_is_the_same_bit_for_bit(folder: Path, tmp_path: Path, dtype: torch.dtype, split: str) -> None:
    for plain, offloaded, held in run_ranks(2, updates, folder, dtype, split, tmp_path):
        assert held == [0, 0, 0]
        assert plain.keys() == offloaded.keys()
        assert all(torch.equal(tensor, offloaded[name]) for name, tensor in plain.items())
