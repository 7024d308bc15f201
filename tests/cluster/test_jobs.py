"""What `klrl launch slurm` submits, on a real SLURM.

The trainer is a stub that saves and listens as the real one does; the batch scripts are those that users get.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, SlurmCluster, StubJob, stub_cluster

pytestmark = pytest.mark.cluster

Submit = Callable[..., StubJob]


def steps_of(job: StubJob, word: str) -> list[int]:
    """The steps that the notes of the first process name: from, or until."""
    return [int(found[1]) for line in job.notes() if (found := re.match(rf"node1 start \d+ {word} (\d+)", line))]


@pytest.fixture
def leaves_nothing(slurm: SlurmCluster) -> Iterator[None]:
    """Ends what a test left in the queue, for the next one wants the nodes."""
    yield
    slurm.run("scancel", "--user=root")
    slurm.until(lambda: not slurm.run("squeue", "--noheader").strip(), "an empty queue")


@pytest.mark.usefixtures("leaves_nothing")
def test_usr1_saves_and_requeues_up_to_the_limit(stub_job: Submit) -> None:
    job = stub_job("limit", requeues=1)
    job.training()
    job.tell("USR1")
    job.training(starts=2)
    assert job.slurm.job(job.job_id)["Restarts"] == "1"
    job.tell("USR1")
    job.slurm.until_state(job.job_id, "FAILED")
    assert "not requeued: this was start 2, and the cluster file allows 1 requeues" in job.log()
    assert steps_of(job, "from")[-1] == steps_of(job, "until")[0] > 0, "the second start goes on where the first ended"
    assert not job.slurm.run("squeue", "--noheader").strip()


@pytest.mark.usefixtures("leaves_nothing")
def test_int_saves_and_ends_and_a_later_launch_goes_on(slurm: SlurmCluster, stub_job: Submit) -> None:
    job = stub_job("stopped")
    job.training()
    job.tell("INT")
    slurm.until_state(job.job_id, "COMPLETED")
    assert "not requeued, as asked" in job.log()
    stopped_at = steps_of(job, "until")[-1]
    again = stub_job("stopped", "--resume", steps=stopped_at + 3)
    slurm.until_state(again.job_id, "COMPLETED")
    assert stopped_at in steps_of(again, "from")
    assert "finished" in again.log()
    assert not (again.folder / "unfinished.json").exists(), "the marker of the first job is gone"


@pytest.mark.usefixtures("leaves_nothing")
def test_a_cancelled_job_stays_cancelled(slurm: SlurmCluster, stub_job: Submit) -> None:
    """scancel is TERM to everything: the ranks save what they can, and the script does not bring the job back."""
    job = stub_job("cancelled")
    job.training()
    slurm.run("scancel", job.job_id)
    slurm.until(lambda: not slurm.run("squeue", "--noheader").strip(), "an empty queue")
    assert (slurm.state_of(job.job_id), job.starts()) == ("CANCELLED", 1)


@pytest.mark.usefixtures("leaves_nothing")
def test_a_preempted_job_saves_and_comes_back(slurm: SlurmCluster, stub_job: Submit) -> None:
    job = stub_job("modest")
    job.training()
    hurry = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1"
    ).strip()
    slurm.until_state(hurry, "COMPLETED")
    job.training(starts=2)
    assert steps_of(job, "from")[-1] > 0
    assert "got USR1" in job.log()
    job.tell("INT")
    slurm.until_state(job.job_id, "COMPLETED")


@pytest.mark.usefixtures("leaves_nothing")
def test_a_crashed_node_costs_the_job_one_start(slurm: SlurmCluster, stub_job: Submit) -> None:
    job = stub_job("crash")
    job.training()
    first = {line.split()[0] for line in job.notes()}
    assert first == {"node1", "node2"}
    slurm.node("crash", "node2")
    try:
        job.training(starts=2)
        assert {line.split()[0] for line in job.notes() if " start 1 " in line} == {"node1", "node3"}
        assert steps_of(job, "from")[-1] > 0
        job.tell("INT")
        slurm.until_state(job.job_id, "COMPLETED")
    finally:
        slurm.node("boot", "node2")
        slurm.until(lambda: "node2" in slurm.run("sinfo", "--noheader", "--states=idle", "--Node"), "node2 is back")


@pytest.mark.usefixtures("leaves_nothing")
def test_names_and_paths_stay_what_they_are(slurm: SlurmCluster, stub_job: Submit) -> None:
    """Blanks, quotes, dollars and % of a path are characters, in the shell and in the lines that SLURM reads."""
    job = stub_job("a 'b' $(touch pwned) %j #c; d", steps=2)
    slurm.until_state(job.job_id, "COMPLETED")
    assert "finished" in job.log()
    assert not list(slurm.work.rglob("pwned"))


@pytest.mark.usefixtures("leaves_nothing")
def test_a_time_limit_is_seen_in_time(slurm: SlurmCluster, stub_job: Submit) -> None:
    """The only test that waits for SLURM's own signal; it may come a minute early, and looks every half minute."""
    job = stub_job("short", "--time", "1", save_s=30)
    job.training()
    slurm.until(lambda: "got USR1" in job.log(), "SLURM's signal", timeout_s=70)
    job.training(starts=2)
    assert steps_of(job, "from")[-1] > 0


@pytest.mark.usefixtures("leaves_nothing")
def test_a_second_launch_into_a_live_run_is_refused(stub_job: Submit) -> None:
    job = stub_job("live")
    with pytest.raises(AssertionError, match=rf"--resume: job {job.job_id} of .*live is still (PENDING|RUNNING)"):
        stub_job("live", "--resume")


@pytest.mark.usefixtures("leaves_nothing")
def test_shards_of_a_study_are_tasks_of_an_array(slurm: SlurmCluster, stub_venv: Path, tmp_path: Path) -> None:
    """`klrl study` on the nodes is the stub: each task gets its shard, and only the signalled one is requeued."""
    folder, file = slurm.work / "study", tmp_path / "cluster.yaml"
    folder.mkdir()
    (folder / "slow").touch()
    file.write_text(json.dumps({**stub_cluster(stub_venv, steps=0), "nodes": 1, "requeues": 1}))
    arguments = ["--kind", "study", "--array", "3", "--cluster", file, "--run-dir", folder]
    array = slurm.launch(ROOT / "examples" / "studies" / "tour_cpu.yaml", *arguments)
    notes = folder / "notes.txt"
    slurm.until(lambda: notes.exists() and notes.read_text().count("begins") == 3, "three shards at work")
    slurm.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
    slurm.until_state(f"{array}_1", "PENDING")
    (folder / "slow").unlink()
    for task in range(3):
        slurm.until_state(f"{array}_{task}", "COMPLETED")
    lines = notes.read_text().splitlines()
    assert sorted(line.split()[-2] for line in lines if line.endswith("ends")) == ["0/3", "1/3", "2/3"]
    begun = [(line.split()[2], line.split()[-2]) for line in lines if line.endswith("begins")]
    assert sorted(begun) == [("0", "0/3"), ("0", "1/3"), ("0", "2/3"), ("1", "1/3")]
