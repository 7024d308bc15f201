"""The batch scripts that slurm/rendered shows. To write them anew: python -m tests.unit.launch.rendered"""

from pathlib import Path

from megatron_klrl.config.cluster import load_cluster
from megatron_klrl.launch.batch_script import BatchJob, Kind, render_script

ROOT = Path(__file__).parents[3]
CLUSTERS = ROOT / "slurm" / "clusters"
FOLDER = ROOT / "slurm" / "rendered"
HOME = Path("/home/me/project")


def train(*, container: bool) -> BatchJob:
    """A training of a 7B model on two nodes, or on four with a container."""
    run_dir = HOME / "runs" / "first"
    return BatchJob(
        kind=Kind.TRAIN,
        name="math_qwen2.5_7b",
        cluster=load_cluster(CLUSTERS / ("gpu_container.yaml" if container else "gpu_venv.yaml")),
        run_dir=run_dir,
        work_dir=HOME,
        code=run_dir / "code",
        python="python" if container else str(HOME / ".venv/bin/python"),
        arguments=("train", str(run_dir / "slurm/math_qwen2.5_7b.yaml"), "--run-dir", str(run_dir), "--resume"),
    )


def evaluation() -> BatchJob:
    """An evaluation of a checkpoint on one node."""
    run_dir = HOME / "runs" / "first-eval"
    checkpoint = str(HOME / "runs/first/checkpoints/step_000100")
    return BatchJob(
        kind=Kind.EVAL,
        name="math_qwen2.5_7b-eval",
        cluster=load_cluster(CLUSTERS / "gpu_venv.yaml", {"nodes": 1}),
        run_dir=run_dir,
        work_dir=HOME,
        code=run_dir / "code",
        python=str(HOME / ".venv/bin/python"),
        arguments=("eval", str(run_dir / "slurm/math_qwen2.5_7b-eval.yaml"), "--checkpoint", checkpoint),
    )


def study() -> BatchJob:
    """A study in four shards."""
    run_dir = HOME / "runs" / "comedy"
    return BatchJob(
        kind=Kind.STUDY,
        name="comedy",
        cluster=load_cluster(CLUSTERS / "gpu_venv.yaml", {"nodes": 1}),
        run_dir=run_dir,
        work_dir=HOME,
        code=run_dir / "code",
        python=str(HOME / ".venv/bin/python"),
        arguments=("study", str(HOME / "comedy.yaml"), "--out", str(run_dir)),
        array=4,
    )


JOBS = {
    "train_venv.sbatch": train(container=False),
    "train_container.sbatch": train(container=True),
    "eval_venv.sbatch": evaluation(),
    "study_venv.sbatch": study(),
}

if __name__ == "__main__":
    for name, job in JOBS.items():
        (FOLDER / name).write_text(render_script(job), encoding="utf-8")
