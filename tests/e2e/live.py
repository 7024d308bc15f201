"""A run of the command line that goes on while the test looks at it and does things to its ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

WAIT_S = 240
_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "KLRL_RUN_DIR", "SLURM_JOB_ID"}


class LiveRun:
    """``klrl train`` in the background, in a run directory.

    Attributes:
        folder: of the run.
        process: that was started.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        launcher: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        words = [sys.executable, *(launcher or ("-m",)), "megatron_klrl.cli", "train", *map(str, arguments)]
        self.folder = folder
        self.process = subprocess.Popen(
            [*words, "--run-dir", str(folder)],
            env=inherited | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of a step are written."""
        deadline = time.monotonic() + WAIT_S
        while self.last_step() < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.02)

    def last_step(self) -> int:
        """The last step in metrics.jsonl; -1 before any."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else -1

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                environment = child.environ()
            except psutil.Error:
                continue
            if environment.get("RANK") == str(number) and "megatron_klrl.cli" in child.cmdline():
                return child
        raise AssertionError(f"there is no rank {number}")

    def end(self) -> tuple[int, str, str]:
        """Exit code, output and errors, once it ends."""
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """Whatever became of it; ranks die with their parent."""
        self.process.kill()
        self.process.communicate()
