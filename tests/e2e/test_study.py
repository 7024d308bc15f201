"""A study on real engines: what its second run computes is what a process of its own computes."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_train import klrl, reproducible
from tests.unit.study.studies import BASE

OVERRIDES = [
    "loop.steps=3",
    "loop.prompts_per_step=4",
    "loop.eval_every=2",
    "data.eval={id: {task: arithmetic, kind: chain, terms: [3, 4], prompts: 8}}",
    "loop.split_gradient_every=2",
    "optimum.prompts=4",
    "optimum.samples=4",
    "kl.allow_biased=true",
]

pytestmark = pytest.mark.e2e


def write_study(folder: Path, **sections: object) -> Path:
    """A study of a few steps."""
    file = folder / "small.yaml"
    file.write_text(
        yaml.safe_dump({"recipe": str(BASE), "overrides": OVERRIDES, "seeds": [0], **sections}, sort_keys=False)
    )
    return file


def rows(folder: Path) -> list[dict[str, float]]:
    """What repeats itself of a run's metrics."""
    return reproducible([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def test_the_second_run_of_a_worker_is_the_run_of_a_fresh_process(tmp_path: Path) -> None:
    """Bit for bit; the first run trains at ten times the rate, so that whatever it left behind would show."""
    cells = {
        "hot": {"overrides": ["kl.estimator=k3", "optimizer.lr=5e-3"]},
        "none": {"overrides": ["kl.beta=0", "loop.max_staleness=1", "generation.temperature=0.9"]},
    }
    out = tmp_path / "out"
    done = klrl("study", write_study(tmp_path, cells=cells), "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (out / "hot/seed=0/log.txt").read_text()
    assert json.loads((out / "hot/seed=0/outcome.json").read_text())["status"] == "done", log[-2000:]
    alone = tmp_path / "alone"
    trained = klrl("train", out / "none/seed=0/config.yaml", "--run-dir", alone)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert rows(out / "none/seed=0") == rows(alone)
    assert len(rows(alone)) == 4
    read = [json.loads((folder / "optimum.json").read_text()) for folder in (out / "none/seed=0", alone)]
    assert read[0] == read[1]
    assert read[0]["optimal"] is None
    assert read[0]["reached"]["kl"] > 0, "the distance is measured where nothing holds the policy"
    assert rows(alone)[1]["kl/exact"] == pytest.approx(0, abs=1e-5), "the first batch is the reference's own"
    report = (out / "report.md").read_text()
    assert "* 2 of 2 runs have ended" in report
    again = klrl("study", tmp_path / "small.yaml", "--out", out)
    assert again.returncode == 0
    assert "2 runs: 2 have ended before, 0 to do" in again.stdout


@pytest.mark.long
def test_a_run_that_diverges_is_a_result_and_half_a_run_is_resumed(tmp_path: Path) -> None:
    """Both on real engines: the next cell finds new ones, and the resumed run is the uninterrupted one, bit for bit."""
    cells = {"wild": {"overrides": ["optimizer.lr=1e37"]}, "calm": {}}
    overrides = [*OVERRIDES, "loop.checkpoint_every=2"]
    file, out = write_study(tmp_path, cells=cells, overrides=overrides, keep_weights=True), tmp_path / "out"
    done = klrl("study", file, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {cell: json.loads((out / cell / "seed=0/outcome.json").read_text()) for cell in cells}
    assert outcomes["wild"]["status"] == "diverged"
    assert "not finite" in outcomes["wild"]["message"]
    assert outcomes["calm"]["status"] == "done"
    assert "* wild/seed=0: diverged: " in (out / "report.md").read_text()
    whole, folder = rows(out / "calm/seed=0"), out / "calm/seed=0"
    (folder / "outcome.json").unlink()
    shutil.rmtree(folder / "checkpoints/step_000003")
    again = klrl("study", file, "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 to do, 1 from a checkpoint" in again.stdout
    assert "resumed from" not in again.stdout, "a worker's console is quiet"
    assert rows(folder) == whole
