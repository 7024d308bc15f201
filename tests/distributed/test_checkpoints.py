"""Which checkpoints stay, which one a run goes on from, and what is said of one that is damaged: on two ranks.

The files stand for a model: what writes one is tested in tests/mcore.
"""

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_klrl.config.checkpoint import CheckpointSection, Fallback
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.loop import checkpoints
from megatron_klrl.loop.checkpoints import Checkpoints, RunState
from megatron_klrl.loop.parts import Writing
from megatron_klrl.runtime import world as ranks
from tests.support.ranks import run_ranks

BYTES = 1 << 20


def write_tensors(folder: Path) -> list[Writing]:
    """What each rank and each part of a checkpoint writes, one level down too."""
    rank = dist.get_rank()
    (folder / f"rank{rank}.distcp").write_bytes(bytes([rank]) * BYTES)
    if rank == 0:
        (folder / "reference").mkdir()
        (folder / "reference" / ".metadata").write_bytes(b"index")
    dist.barrier()
    return []


def save(run: Checkpoints, *steps: int, values: dict[int, float] | None = None) -> None:
    for step in steps:
        measured = {"eval/id/accuracy": values[step]} if values and step in values else {}
        run.begin(RunState(step=step, weight_version=step), "model: {}\n", write_tensors, values=measured)
        run.finish()


def left(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def on_ranks(function: Callable[..., Any], root: Path, *args: Any) -> Any:
    first, second = run_ranks(2, joined, function, root, *args)
    assert first == second, "ranks that disagree here train from different checkpoints"
    return first


def joined(function: Callable[..., Any], *args: Any) -> Any:
    ranks.join(timeout_s=30)
    try:
        return function(*args)
    finally:
        ranks.leave()


def resumed(root: Path, rules: CheckpointSection) -> tuple[str | None, list[str], str]:
    """The folder, what was said on the way, and what was refused."""
    said: list[str] = []
    try:
        found = Checkpoints(root, rules).to_resume(said.append)
    except UserError as error:
        return None, said, str(error)
    return (None if found is None else found.name), said, ""


def damage(folder: Path, kind: str) -> None:
    file = folder / "rank1.distcp"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif kind == "gone":
        file.unlink()
    elif kind == "more":
        (folder / "common.pt").write_bytes(b"from elsewhere")
    elif kind == "below":
        (folder / "reference" / ".metadata").write_bytes(b"INDEX")
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"files": [')


DAMAGES = {
    "truncated": "rank1.distcp has 1048575 bytes, 1048576 were written",
    "changed": "rank1.distcp is not what was written (checksum)",
    "gone": "rank1.distcp is missing",
    "more": "common.pt does not belong to it",
    "below": "reference/.metadata is not what was written (checksum)",
    "no manifest": "manifest.json cannot be read (No such file or directory): not complete, or not a",
    "broken manifest": "manifest.json is damaged",
}


def every_damage(root: Path) -> dict[str, list[Any]]:
    """For each kind: what a resume says with and without a fallback, and what a command with this folder says."""
    found: dict[str, list[Any]] = {}
    for kind in DAMAGES:
        place = root / kind.replace(" ", "_")
        save(Checkpoints(place, CheckpointSection()), 4, 8)
        if dist.get_rank() == 0:
            damage(place / "step_000008", kind)
        dist.barrier()
        found[kind] = [resumed(place, CheckpointSection())]
        try:
            checkpoints.check(place / "step_000008")
        except UserError as error:
            found[kind].append(str(error))
        found[kind].append(resumed(place, CheckpointSection(fallback=Fallback.PREVIOUS)))
        dist.barrier()
        found[kind].append(left(place))
    return found


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_if_asked(tmp_path: Path) -> None:
    for kind, (refused, named, passed_over, folders) in on_ranks(every_damage, tmp_path).items():
        folder = tmp_path / kind.replace(" ", "_") / "step_000008"
        text = f"{folder} is damaged: {DAMAGES[kind]}"
        assert refused[0] is None
        assert refused[2].startswith(f"--resume: {text}")
        assert "Fix: set checkpoint.fallback=previous" in refused[2]
        assert passed_over[0] == "step_000004"
        (said,) = passed_over[1]
        assert said.startswith(f"  {text}")
        assert named.startswith(f"checkpoint: {text}")
        assert folders == ["damaged_step_000008", "step_000004"], "not found again by the next start"


def nothing_whole(root: Path) -> list[Any]:
    found = [resumed(root / "none", CheckpointSection())]
    save(Checkpoints(root, CheckpointSection()), 4, 8)
    found.append(resumed(root, CheckpointSection()))
    dist.barrier()
    if dist.get_rank() == 0:
        for step in (4, 8):
            damage(root / f"step_{step:06d}", "gone")
    dist.barrier()
    found.append(resumed(root, CheckpointSection(fallback=Fallback.PREVIOUS)))
    return found


def test_the_newest_is_found_and_none_is_no_error_but_all_damaged_is(tmp_path: Path) -> None:
    none, newest, broken = on_ranks(nothing_whole, tmp_path)
    assert none == (None, [], "")
    assert newest == ("step_000008", [], "")
    assert broken[2].startswith(f"--resume: every checkpoint in {tmp_path} is damaged. Fix: ")


def kept(root: Path) -> list[list[str]]:
    plain = Checkpoints(root / "plain", CheckpointSection(keep=2))
    save(plain, 1, 2, 3, 4)
    best = Checkpoints(root / "best", CheckpointSection(keep=1, keep_best="eval/id/accuracy"))
    save(best, 1, 2, 3, 4, 5, values={1: 0.1, 2: 0.9, 4: 0.5})
    again = Checkpoints(root / "best", CheckpointSection(keep=1))
    again.to_resume(lambda _: None)
    save(again, 6, 7)
    return [left(root / "plain"), left(root / "best")]


def test_the_newest_the_best_and_the_resumed_one_stay(tmp_path: Path) -> None:
    plain, best = on_ranks(kept, tmp_path)
    assert plain == ["step_000003", "step_000004"]
    assert best == ["step_000005", "step_000007"], "2 was the best until the recipe no longer asked for it"


def kept_best(root: Path) -> list[str]:
    save(Checkpoints(root, CheckpointSection(keep=1, keep_best="eval/id/accuracy")), 1, 2, 3, values={1: 0.9, 3: 0.5})
    return left(root)


def test_the_best_counts_with_what_its_own_step_measured(tmp_path: Path) -> None:
    assert on_ranks(kept_best, tmp_path) == ["step_000001", "step_000003"]
    manifest = json.loads((tmp_path / "step_000001" / "manifest.json").read_text())
    assert manifest["measured"] == {"metric": "eval/id/accuracy", "value": 0.9}
    expected = ["rank0.distcp", "rank1.distcp", "recipe.yaml", "reference/.metadata", "state.json"]
    assert list(manifest["files"]) == expected


def swept(root: Path) -> list[str]:
    run = Checkpoints(root, CheckpointSection())
    save(run, 1)
    if dist.get_rank() == 0:
        for name in (".writing_000002", ".deleting_step_000000"):
            (root / name).mkdir()
            (root / name / "state.json").touch()
    dist.barrier()
    found = resumed(root, CheckpointSection())
    if dist.get_rank() == 0:
        run.sweep()
    dist.barrier()
    return [str(found[0]), *left(root)]


def test_what_a_start_that_died_left_half_done_is_neither_used_nor_kept(tmp_path: Path) -> None:
    assert on_ranks(swept, tmp_path) == ["step_000001", "step_000001"]


def out_of_room(root: Path) -> tuple[str, list[str]]:
    run = Checkpoints(root, CheckpointSection())
    save(run, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, before[1]))
    try:
        save(run, 2)
        message = ""
    except WorkError as error:
        # each rank looks for itself, and others write to the disk meanwhile
        message = re.sub(r"\d+\.\d\d GiB are free", "some GiB are free", str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    return message, left(root)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    message, folders = on_ranks(out_of_room, tmp_path)
    assert message.startswith(f"the checkpoint of step 2 could not be written to {tmp_path} ([Errno 27] File too large")
    assert "some GiB are free there" in message
    assert folders == ["step_000001"]


@pytest.mark.parametrize("name", ["state.json", "reference_rates"])
def test_a_state_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    if name != "state.json":
        (tmp_path / "state.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        checkpoints.read_state(tmp_path)
