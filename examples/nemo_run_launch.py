"""A sweep over beta with NeMo-Run: recipes are functions, clusters are executors.

    python examples/nemo_run_launch.py --dryrun                                  # what would run
    python examples/nemo_run_launch.py                                           # here, one after the other
    python examples/nemo_run_launch.py --cluster slurm/clusters/cpu.yaml         # SLURM: all at once

Needs megatron-klrl[nemo-run]. The nodes need no NeMo-Run: a training is a `run.Script`, not a pickled function.
"""

import argparse
from pathlib import Path

import nemo_run as run

from megatron_klrl.config.cluster import Cluster, load_cluster
from megatron_klrl.launch.nemo_run import local_executor, slurm_executor, train_script

RECIPE = "examples/recipes/arithmetic_cpu.yaml"


def folder(beta: float) -> Path:
    """Where a run of the sweep goes."""
    return Path("runs") / f"sweep-beta-{beta}"


def arithmetic(beta: float, cluster: Cluster | None) -> run.Script:
    """The default recipe with another beta."""
    return train_script(RECIPE, f"kl.beta={beta}", "loop.steps=20", run_dir=folder(beta), cluster=cluster)


def executor(beta: float, cluster: Cluster | None) -> run.Executor:
    """This machine, or a cluster."""
    return local_executor() if cluster is None else slurm_executor(cluster, run_dir=folder(beta))


def main() -> None:
    """Add a task for each beta, and run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.03, 0.3])
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--dryrun", action="store_true")
    options = parser.parse_args()
    cluster = None if options.cluster is None else load_cluster(options.cluster)
    with run.Experiment("beta-sweep") as experiment:
        for beta in options.betas:
            experiment.add(arithmetic(beta, cluster), executor=executor(beta, cluster), name=f"beta-{beta}")
        if options.dryrun:
            experiment.dryrun()
        else:
            experiment.run(sequential=cluster is None)


if __name__ == "__main__":
    main()
