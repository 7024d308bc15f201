"""Which Python runs on the nodes."""

import sys
from pathlib import Path

from megatron_klrl.config.cluster import Cluster


def python_of(cluster: Cluster | None) -> str:
    """The container's, that of the virtual environment, or the one that runs this."""
    if cluster is None or (cluster.container is None and cluster.venv is None):
        return sys.executable
    if cluster.container is not None:
        return cluster.container.python
    return str(Path(cluster.venv or "").expanduser().absolute() / "bin" / "python")
