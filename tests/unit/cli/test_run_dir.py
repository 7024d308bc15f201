import os
import signal
from pathlib import Path

import pytest

from megatron_klrl.cli.rank import RankPlace, rank_place
from megatron_klrl.cli.run_dir import choose_run_dir, prepare_run_dir
from megatron_klrl.config.load import load_recipe
from megatron_klrl.errors import UserError
from megatron_klrl.launch.failure import Failure, write_failure
from megatron_klrl.runtime.stop import write_unfinished
from tests.unit.config.folders import make_recipe


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "KLRL_RUN_DIR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def place(rank: int, *, one_machine: bool = True, run_dir: Path | None = None) -> RankPlace:
    return RankPlace(rank=rank, world_size=2, one_machine=one_machine, run_dir=run_dir)


def make_run(name: str, age_s: int) -> Path:
    run = Path("runs") / name
    run.mkdir(parents=True)
    config = run / "config.yaml"
    config.touch()
    os.utime(config, (10**9 - age_s, 10**9 - age_s))
    return run


def test_two_runs_in_one_second_get_two_names() -> None:
    names = set()
    for _ in range(3):
        run = choose_run_dir("tiny", None, resume=False, place=None)
        run.mkdir(parents=True)
        names.add(run.name)
    assert len(names) == 3


def test_resume_takes_the_newest_run_of_this_recipe() -> None:
    make_run("tiny-20260101-000000", 50)
    newest = make_run("tiny-20260102-000000-2", 30)
    make_run("tiny-long-20260103-000000", 1)
    (Path("runs") / "tiny-20270101-000000").mkdir()
    assert choose_run_dir("tiny", None, resume=True, place=None) == newest


def test_a_run_to_resume_exists_unless_a_machine_repeats_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Path("missing")
    with pytest.raises(UserError, match="missing holds no run to resume"):
        choose_run_dir("tiny", missing, resume=True, place=None)
    assert choose_run_dir("tiny", missing, resume=True, place=place(1)) == missing, "only one rank may look"
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "0")
        with pytest.raises(UserError, match="missing holds no run to resume"):
            choose_run_dir("tiny", missing, resume=True, place=place(0))
        monkeypatch.setenv(name, "1")
        assert choose_run_dir("tiny", missing, resume=True, place=place(0)) == missing
        assert "missing holds no run yet; this start begins one" in capsys.readouterr().err
        monkeypatch.delenv(name)


def test_what_an_earlier_start_said_of_its_end_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = load_recipe(make_recipe(tmp_path))
    prepare_run_dir(run, recipe, resume=False)
    write_failure(run, Failure(kind="work", rank=0, message="old"))
    write_unfinished(run, step=1, steps=2, number=signal.SIGTERM)
    prepare_run_dir(run, recipe, resume=True)
    assert [entry.name for entry in run.iterdir()] == ["config.yaml"]


def test_ranks_of_one_torchrun_agree_on_a_name() -> None:
    names = {choose_run_dir("tiny", None, resume=False, place=place(rank)) for rank in (0, 1)}
    assert len(names) == 1


def test_ranks_of_one_slurm_job_agree_on_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    chosen = choose_run_dir("tiny", None, resume=False, place=place(1, one_machine=False))
    assert chosen == Path("runs/tiny-4711")


def test_ranks_on_several_machines_need_a_name() -> None:
    with pytest.raises(UserError, match=r"--run-dir: .*cannot agree.*Fix: add --run-dir"):
        choose_run_dir("tiny", None, resume=False, place=place(0, one_machine=False))


def test_only_rank_zero_refuses_a_used_folder() -> None:
    used = make_run("used", 1)
    assert choose_run_dir("tiny", used, resume=False, place=place(1)) == used
    with pytest.raises(UserError, match="already holds a run"):
        choose_run_dir("tiny", used, resume=False, place=place(0))


def test_a_file_is_no_run_directory() -> None:
    Path("file").touch()
    with pytest.raises(UserError, match="file is a file"):
        choose_run_dir("tiny", Path("file"), resume=False, place=None)


def test_the_launchers_choice_stands() -> None:
    run = Path("elsewhere")
    assert choose_run_dir("tiny", None, resume=True, place=place(1, run_dir=run)) == run


def test_place_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_place() is None
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert rank_place() == RankPlace(rank=3, world_size=8, one_machine=False, run_dir=None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("KLRL_RUN_DIR", "runs/x")
    assert rank_place() == RankPlace(rank=3, world_size=8, one_machine=True, run_dir=Path("runs/x"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE is 'many'"):
        rank_place()


def test_a_rank_that_is_quicker_than_the_first_does_not_make_the_folder_a_used_one() -> None:
    run = Path("runs/shared")
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "rank1.txt").touch()
    assert choose_run_dir("tiny", run, resume=False, place=place(0)) == run
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="already holds a run"):
        choose_run_dir("tiny", run, resume=False, place=place(0))
    assert choose_run_dir("tiny", run, resume=False, place=place(1)) == run, "only the first one looks"
