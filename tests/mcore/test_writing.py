"""A checkpoint that is written while training goes on holds what was there when it began, on two ranks."""

import resource
import threading
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from tests.mcore.test_compat import resume, save_after_some_steps, update
from tests.support.models import FAMILIES, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

LAYOUT = {"tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), FAMILIES["qwen3_tied"])


def save_while_training(folder: Path, to: Path, reference: Path) -> list[bool]:
    """No file is written before two more updates are done, and another save is made meanwhile."""
    gate = threading.Event()
    write = FileSystemWriterAsync.write_preloaded_data

    def later(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            gate.wait()
        return write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(later)
    with trainer(folder, **LAYOUT) as engine:
        for seed in range(2):
            update(engine, seed)
        writing = engine.begin_save(to)
        engine.save_reference(reference)
        for seed in range(2, 4):
            update(engine, seed)
        states = [writing.is_written]
        gate.set()
        writing.finish()
        return [*states, writing.is_written]


def test_it_holds_what_was_there_when_it_began(folder: Path, tmp_path: Path) -> None:
    at_once, beside, reference = (tmp_path / name for name in ("at once", "beside", "reference"))
    for each in (at_once, beside, reference):
        each.mkdir()
    run_ranks(2, save_after_some_steps, folder, at_once, LAYOUT)
    assert run_ranks(2, save_while_training, folder, beside, reference) == [[False, True]] * 2
    assert run_ranks(2, resume, folder, beside, LAYOUT) == run_ranks(2, resume, folder, at_once, LAYOUT)


def save_without_room(folder: Path, to: Path) -> str:
    with trainer(folder, **LAYOUT) as engine:
        update(engine, 0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        writing = engine.begin_save(to)
        try:
            writing.finish()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def test_a_rank_without_room_is_an_error_on_every_rank_at_the_end(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_without_room, folder, tmp_path)
    assert "rank 0" in first
    assert "another rank has the reason" in second
    assert not (tmp_path / "metadata.json").exists()
