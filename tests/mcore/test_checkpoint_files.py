"""Files of a checkpoint that are not what they should be: refused with one message, and nothing in them is run."""

import io
import os
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klrl.errors import UserError
from megatron_klrl.mcore import data_only
from megatron_klrl.mcore.engine import MegatronEngine
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._trace),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), FAMILIES["qwen3_tied"])


def update(engine: MegatronEngine) -> None:
    batch = rollout_batch()
    engine.forward_backward(train_batch(batch), policy_loss(batch))
    engine.optim_step()


def write(folder: Path, to: Path) -> None:
    with trainer(folder) as engine:
        update(engine)
        engine.save(to)


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one update."""
    to = tmp_path_factory.mktemp("saved")
    run_ranks(1, write, folder, to)
    return to


def index(saved: Path) -> Any:
    return data_only.read_index(saved)


def plant_in_index(saved: Path, trace: Path) -> None:
    """In the pickled index, where a reader expects the name of a save."""
    found = index(saved)
    found.planner_data = Payload(trace)
    (saved / ".metadata").write_bytes(pickle.dumps(found))


def plant_in_object(saved: Path, trace: Path) -> None:
    """In place of what is stored beside tensors, which torch loads with weights_only=False."""
    found = index(saved)
    (name,) = [each for each in found.storage_data if each.fqn.startswith("common_state")]
    content = io.BytesIO()
    torch.save([{"payload": Payload(trace)}], content)
    (saved / "__9_0.distcp").write_bytes(content.getvalue())
    place = found.storage_data[name]
    found.storage_data[name] = replace(place, relative_path="__9_0.distcp", offset=0, length=len(content.getvalue()))
    (saved / ".metadata").write_bytes(pickle.dumps(found))


def truncate(saved: Path, trace: Path) -> None:
    del trace
    (file,) = saved.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_index(saved: Path, trace: Path) -> None:
    del trace
    (saved / ".metadata").write_bytes(b"")


def read(folder: Path, saved: Path) -> str:
    with trainer(folder) as engine:
        try:
            engine.load(saved)
        except UserError as error:
            return str(error)
        return ""


CASES = {
    plant_in_index: "posix.mkdir, which no checkpoint has; it was not run",
    plant_in_object: "Weights only load failed",
    truncate: "rank 0: ",
    empty_index: "its index cannot be read (EOFError)",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_a_bad_file_is_refused_and_nothing_in_it_runs(folder: Path, good: Path, tmp_path: Path, change: Any) -> None:
    saved, trace = tmp_path / "saved", tmp_path / "trace"
    shutil.copytree(good, saved)
    change(saved, trace)
    (message,) = run_ranks(1, read, folder, saved)
    assert message.startswith(f"checkpoint: {saved} does not load: ")
    assert CASES[change] in message
    assert len(message.splitlines()) == 1
    assert not trace.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """Without the guard: else the test above would pass for the wrong reason."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "by pickle")))
    content = io.BytesIO()
    torch.save(Payload(tmp_path / "by torch"), content)
    content.seek(0)
    torch.load(content, weights_only=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by pickle", "by torch"]


def test_the_guard_is_taken_away_again() -> None:
    module: Any = data_only.torch_files
    before = module.pickle, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with data_only.data_only():
        assert module.pickle is not before[0]
    assert (module.pickle, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")) == before


def write_without_room(folder: Path, to: Path) -> list[str]:
    messages = []
    with trainer(folder, tensor=2) as engine:
        update(engine)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            engine.save(to)
        except OSError as error:
            messages.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return messages


def test_a_rank_without_room_is_an_error_on_every_rank(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(2, write_without_room, folder, tmp_path)
    assert [len(messages) for messages in found] == [1, 1]
    assert "rank 0" in found[0][0]
    assert not (tmp_path / "metadata.json").exists()


def test_a_real_checkpoint_passes(folder: Path, good: Path) -> None:
    assert index(good).storage_data
    assert run_ranks(1, read, folder, good) == [""]
