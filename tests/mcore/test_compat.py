"""What Megatron-Core needs on CPU and with torch's Adam; each test fails when its workaround is left out."""

from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import tensor_parallel

from megatron_klrl.mcore import checkpoint, compat, groups, writing
from megatron_klrl.runtime import world
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer

STEPS_BEFORE, STEPS_AFTER = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", FAMILIES["qwen3_tied"])


def update(engine, seed: int) -> tuple[float, float]:
    batch = rollout_batch(seed=seed)
    loss = engine.forward_backward(train_batch(batch, seed=seed), policy_loss(batch))
    return loss.loss, engine.optim_step().grad_norm


def straight(folder: Path) -> list[tuple[float, float]]:
    with trainer(folder, with_reference=False) as engine:
        return [update(engine, seed) for seed in range(STEPS_BEFORE + STEPS_AFTER)]


def save_after_some_steps(folder: Path, to: Path, layout: dict[str, int]) -> None:
    with trainer(folder, with_reference=False, **layout) as engine:
        for seed in range(STEPS_BEFORE):
            update(engine, seed)
        engine.save(to)


def resume(folder: Path, saved: Path, layout: dict[str, int]) -> list[tuple[float, float]]:
    with trainer(folder, with_reference=False, **layout) as engine:
        engine.load(saved)
        return [update(engine, STEPS_BEFORE + seed) for seed in range(STEPS_AFTER)]


def resume_with_shared_steps(folder: Path, saved: Path) -> list[tuple[float, float]]:
    checkpoint.torch_adam_finish_load = lambda _: None
    return resume(folder, saved, {})


def resume_without_preparation(folder: Path, saved: Path) -> None:
    checkpoint.torch_adam_prepare_load = lambda _: None
    resume(folder, saved, {})


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("saved")
    run_ranks(1, save_after_some_steps, folder, to, {})
    return to


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[float, float]]:
    return run_ranks(1, straight, folder)[0][STEPS_BEFORE:]


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, saved: Path, expected: list[tuple[float, float]]) -> None:
    """Bit for bit in the same layout, over several steps: the first loss alone would hide a wrong optimizer state."""
    assert run_ranks(1, resume, folder, saved, {})[0] == expected


@pytest.mark.parametrize(
    ("writer", "ranks_writing", "reader", "ranks_reading"),
    [
        ({"tensor": 2}, 2, {}, 1),
        ({}, 2, {"pipeline": 2}, 2),  # data parallel 2 -> pipeline 2
        ({"tensor": 2}, 4, {"tensor": 2, "pipeline": 2}, 4),
        ({"pipeline": 2}, 2, {}, 1),
        ({"pipeline": 2, "virtual": 2}, 2, {"context": 2}, 2),
        ({"tensor": 2}, 2, {"pipeline": 2, "virtual": 2}, 2),
    ],
)
def test_a_checkpoint_loads_in_another_layout(
    folder: Path,
    tmp_path: Path,
    expected: list[tuple[float, float]],
    writer: dict[str, int],
    ranks_writing: int,
    reader: dict[str, int],
    ranks_reading: int,
) -> None:
    # microbatches of 1 divide 6 rows over any data-parallel size without blank rows
    run_ranks(ranks_writing, save_after_some_steps, folder, tmp_path, {**writer, "micro_batch_size": 1})
    for found in run_ranks(ranks_reading, resume, folder, tmp_path, {**reader, "micro_batch_size": 1}):
        # Another order of float32 sums, and Adam divides by small second moments: weights after two steps at lr 1e-2
        # agree to about 1e-4, losses of a few nats likewise.
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-3, abs=2e-4)
            assert norm == pytest.approx(expected_norm, rel=2e-3)


def test_adam_steps_are_not_shared_after_load(folder: Path, saved: Path, expected: list[tuple[float, float]]) -> None:
    """Without the workaround the first step after a load is right and the later ones are not."""
    wrong = run_ranks(1, resume_with_shared_steps, folder, saved)[0]
    assert wrong[0] == expected[0]
    assert wrong[1:] != expected[1:], "upstream shares no step counter any more: torch_adam_finish_load can go"


def save_without_padding(folder: Path, to: Path) -> None:
    checkpoint.keep_bucket_padding = lambda _: None
    save_after_some_steps(folder, to, {"pipeline": 2})


def test_state_behind_a_padded_bucket_is_saved_in_place(
    folder: Path, tmp_path: Path, expected: list[tuple[float, float]]
) -> None:
    """A tied model's last stage has two buckets; without the workaround what it saves is shifted, silently."""
    run_ranks(2, save_without_padding, folder, tmp_path)
    (wrong,) = run_ranks(1, resume, folder, tmp_path, {})
    assert abs(wrong[0][0] - expected[0][0]) > 0.1, "upstream saves it in place now: keep_bucket_padding can go"


def test_distributed_optimizer_loads_torch_adam(folder: Path, saved: Path) -> None:
    """Without the workaround a fresh optimizer cannot be filled."""
    with pytest.raises(AssertionError, match="rank 0 failed"):
        run_ranks(1, resume_without_preparation, folder, saved)


def random_streams_differ() -> tuple[float, float]:
    compat.run_on_cpu()
    place = world.join(timeout_s=60)
    groups.initialize(place, groups.Layout(tensor=2), seed=0)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        own = float(torch.rand(1))
    common = float(torch.rand(1))
    groups.destroy()
    world.leave()
    return own, common


def test_tensor_parallel_ranks_have_their_own_random_stream() -> None:
    """Left to torch.cuda, every rank would silently draw the same numbers on CPU."""
    (own_0, _), (own_1, _) = run_ranks(2, random_streams_differ)
    assert own_0 != own_1


def test_compat_does_nothing_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert compat.run_on_cpu() is False
    assert torch.cuda.current_device is before


def children_after_save(folder: Path, to: Path, upstream: str) -> int:
    if upstream == "as it is":
        writing.write_in_this_process = lambda: None
    save_after_some_steps(folder, to, {})
    return len(psutil.Process().children())


def test_a_save_starts_no_process(folder: Path, tmp_path: Path) -> None:
    """Without the workaround there is one, which signals to the process group end."""
    for name in ("mended", "as it is"):
        (tmp_path / name).mkdir()
    assert run_ranks(1, children_after_save, folder, tmp_path / "mended", "mended") == [0]
    (upstream,) = run_ranks(1, children_after_save, folder, tmp_path / "as it is", "as it is")
    assert upstream > 0, "upstream starts none any more: write_in_this_process can go"


def comes_back_as_the_optimizer_has_it(folder: Path, to: Path, leave_out: bool) -> bool:  # noqa: FBT001  a rank's
    """Of a model whose bf16 weights are not what the optimizer's round to, as another's in 8 bits are not."""
    options = {"with_reference": False, "dtype": torch.bfloat16}
    with trainer(folder, **options) as engine:
        update(engine, 0)
        wanted = engine.weight_checksums()
        with torch.no_grad():
            for parameter in engine.chunks[0].parameters():
                parameter.add_(1)
        engine.save(to)
    if leave_out:
        checkpoint.take_weights_of = lambda _: None
    with trainer(folder, **options) as engine:
        engine.load(to)
        return engine.weight_checksums() == wanted


@pytest.mark.parametrize("leave_out", [False, True])
def test_weights_come_back_as_the_optimizer_has_them(folder: Path, tmp_path: Path, leave_out: bool) -> None:  # noqa: FBT001  pytest's
    assert run_ranks(1, comes_back_as_the_optimizer_has_it, folder, tmp_path, leave_out) == [not leave_out]
