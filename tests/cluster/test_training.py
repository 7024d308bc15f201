"""The real trainer on two nodes: Megatron-Core with tensor parallelism across them, and a vLLM engine on each."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import RECIPE, SlurmCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = 12
SETTINGS = [
    f"loop.steps={STEPS}",
    "loop.checkpoint_every=3",
    "loop.prompts_per_step=8",
    "loop.eval_every=0",
    "loop.split_gradient_every=0",
    "optimum.prompts=0",
    "data.eval={id: {task: arithmetic, kind: chain, terms: [3, 4], prompts: 8, samples: 2}}",
]
NOT_REPRODUCED = ("time/", "throughput/", "memory/")
RANK = r"^[^ ]*python[0-9.]* -P -m megatron_klrl.cli train"


@dataclass(frozen=True)
class Training:
    """A training on two nodes."""

    slurm: SlurmCluster
    job_id: str
    folder: Path

    def rows(self) -> list[dict[str, float]]:
        """Metrics so far; the last line may be half written."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def until_step(self, step: int) -> None:
        """Wait for a step."""

        def there() -> bool:
            assert self.slurm.state_of(self.job_id) != "FAILED", self.slurm.logs()
            return any(row["step"] >= step for row in self.rows())

        self.slurm.until(there, f"step {step} of {self.folder.name}", timeout_s=300)

    def reproducible(self) -> list[dict[str, float]]:
        """Metrics that the same computation gives again."""
        rows = self.rows()
        return [{name: value for name, value in row.items() if not name.startswith(NOT_REPRODUCED)} for row in rows]


def launch(slurm: SlurmCluster, folder: Path, name: str, **settings: object) -> Training:
    cluster = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1, "nodes": 2, "venv": sys.prefix, **settings}
    file = folder / f"{name}.cluster.yaml"
    file.write_text(json.dumps(cluster))
    run_dir = slurm.work / name
    job_id = slurm.launch(RECIPE, *SETTINGS, "--cluster", file, "--run-dir", run_dir)
    return Training(slurm=slurm, job_id=job_id, folder=run_dir)


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """From the submission to the end."""
    training = launch(slurm, tmp_path_factory.mktemp("clusters"), "uninterrupted")
    slurm.until_state(training.job_id, "COMPLETED", "FAILED", "NODE_FAIL", timeout_s=400)
    assert slurm.state_of(training.job_id) == "COMPLETED", slurm.logs()
    return training


def test_two_nodes_train_to_the_end(uninterrupted: Training) -> None:
    assert [row["step"] for row in uninterrupted.rows()] == list(range(STEPS + 1))
    assert uninterrupted.slurm.job(uninterrupted.job_id)["NumNodes"] == "2"
    assert (uninterrupted.folder / "hf" / "model.safetensors").exists()
    assert not (uninterrupted.folder / "unfinished.json").exists()
    rows = uninterrupted.rows()
    assert all(row["mismatch/logprob_abs_mean"] < 1e-5 for row in rows[1:]), "weights reach the engine across nodes"


def test_the_card_names_the_commit_that_was_copied(uninterrupted: Training) -> None:
    copied = (uninterrupted.folder / "code" / ".commit").read_text().strip()
    assert copied in (uninterrupted.folder / "card.md").read_text()


def test_a_killed_rank_and_a_requeue_change_no_number(
    slurm: SlurmCluster, uninterrupted: Training, tmp_path: Path
) -> None:
    """kill -9 of a rank: torchrun starts all again from the last checkpoint. USR1: saved, requeued, resumed."""
    training = launch(slurm, tmp_path, "interrupted", restarts=1)
    training.until_step(4)
    slurm.node("on", "node2", "pkill", "--signal", "KILL", "--full", RANK)
    training.until_step(7)
    assert slurm.job(training.job_id)["Restarts"] == "0", "torchrun did that on the same nodes"
    slurm.run("scancel", "--signal=USR1", "--batch", training.job_id)
    slurm.until(lambda: slurm.job(training.job_id)["Restarts"] == "1", "the requeue", timeout_s=120)
    slurm.until_state(training.job_id, "COMPLETED", "FAILED", timeout_s=400)
    log = next((training.folder / "slurm").glob("job-*.out")).read_text()
    assert "stopped before the end" in log
    assert "back into the queue" in log
    assert slurm.state_of(training.job_id) == "COMPLETED", log
    assert training.reproducible() == uninterrupted.reproducible()
