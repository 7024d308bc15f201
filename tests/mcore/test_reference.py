"""The reference follows the policy by the numbers, and survives a checkpoint into another layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klrl.mcore.conversion import parts_by_name
from megatron_klrl.mcore.engine import MegatronEngine
from megatron_klrl.mcore.model import unwrap
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

DECAY = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model: its last stage holds the embedding twice."""
    return write_model(tmp_path_factory.mktemp("model"), FAMILIES["qwen3_tied"])


def held(engine: MegatronEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of this rank's parts of policy and reference."""
    reference = [unwrap(chunk) for chunk in engine._present_reference().chunks]
    return tuple(
        {name: part.clone() for name, part in parts_by_name(chunks, groups=engine.groups).items()}
        for chunks in (engine._bare(), reference)
    )


def moves(folder: Path, layout: dict, dtype: torch.dtype) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Policy and reference at the start, after the policy moved, after an average, after a reset."""
    with trainer(folder, averages_reference=True, dtype=dtype, **layout) as engine:
        states = [held(engine)]
        assert engine.reference_checksums() == engine.weight_checksums()
        engine.perturb(scale=0.1, seed=1)
        states.append(held(engine))
        assert engine.reference_checksums() != engine.weight_checksums()
        engine.follow_policy(decay=DECAY)
        states.append(held(engine))
        engine.follow_policy(decay=0.0)
        states.append(held(engine))
        assert engine.reference_checksums() == engine.weight_checksums()
        return states


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["one_rank", "pp2"])
def test_averages_and_resets_by_hand(folder: Path, layout: dict) -> None:
    for start, moved, averaged, reset in run_ranks(2 if layout else 1, moves, folder, layout, torch.float32):
        for name, policy in moved[0].items():
            assert torch.equal(moved[1][name], start[1][name]), "a reference stays where it is"
            expected = DECAY * start[1][name] + (1 - DECAY) * policy
            torch.testing.assert_close(averaged[1][name], expected, rtol=1e-6, atol=1e-7)  # float32 rounds once more
            assert torch.equal(reset[1][name], policy)


def small_steps(folder: Path) -> tuple[float, float]:
    """How far 40 averages with decay .99 take a bfloat16 reference to the policy, kept exactly or not."""
    shares = []
    for keeps_exact in (True, False):
        with trainer(folder, averages_reference=keeps_exact, dtype=torch.bfloat16) as engine:
            engine.perturb(scale=0.1, seed=1)
            policy, start = held(engine)
            for _ in range(40):
                engine.follow_policy(decay=0.99)
            _, end = held(engine)
            moved = sum((end[n].double() - start[n].double()).abs().sum() for n in policy)
            whole = sum((policy[n].double() - start[n].double()).abs().sum() for n in policy)
            shares.append(float(moved / whole))
    return shares[0], shares[1]


def test_a_bfloat16_reference_sees_small_steps(folder: Path) -> None:
    """1 - .99 ** 40 = .331 of the way; averaged in bfloat16 itself most steps round to nothing."""
    exact, rounded = run_ranks(1, small_steps, folder)[0]
    assert exact == pytest.approx(1 - 0.99**40, rel=0.02)  # what is left is the rounding of the end to 8 bits
    assert rounded < 0.9 * exact


def written(folder: Path, to: Path) -> dict[str, str]:
    with trainer(folder, averages_reference=True, tensor=2) as engine:
        engine.perturb(scale=0.1, seed=1)
        engine.follow_policy(decay=DECAY)
        engine.save_reference(to)
        return engine.reference_checksums()


def read(folder: Path, saved: Path) -> tuple[dict[str, str], dict[str, str]]:
    with trainer(folder, pipeline=2) as engine:
        engine.load_reference(saved)
        return engine.reference_checksums(), engine.weight_checksums()


def test_a_moved_reference_loads_in_another_layout(folder: Path, tmp_path: Path) -> None:
    wanted = run_ranks(2, written, folder, tmp_path)[0]
    for found, policy in run_ranks(2, read, folder, tmp_path):
        assert found == wanted
        assert found != policy


def test_without_a_reference_nothing_can_follow(folder: Path) -> None:
    (said,) = run_ranks(1, without, folder)
    assert "there is no reference" in said


def without(folder: Path) -> str:
    with trainer(folder, with_reference=False) as engine:
        try:
            engine.follow_policy(decay=0.0)
        except ValueError as error:
            return str(error)
        return ""
