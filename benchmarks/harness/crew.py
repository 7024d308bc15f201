"""The processes of one contestant, and one JSON request to all of them. Imports no torch."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 4


class CrewError(Exception):
    """A process ended or did not answer; says which, and the end of what it wrote to stderr."""


class Crew:
    """One process per rank. Start it, ask it, close it; as a context it closes itself."""

    def __init__(self, *, folder: Path, ranks: int, threads: int, device: str, environment: Mapping[str, str]) -> None:
        """Start the processes; returns before they are ready.

        Args:
            folder: an empty folder of this crew's own, for logs and the file at which the ranks meet.
            ranks: number of processes.
            threads: threads of each.
            device: ``cpu`` or ``cuda``; how the ranks are joined.
            environment: variables on top of this process's.
        """
        folder.mkdir(parents=True)
        self._logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        variables = {**os.environ, **quiet_environment(threads), **environment}
        self._processes = [_start(log, variables) for log in self._logs]
        self._replies: list[queue.Queue[str]] = [_read(process) for process in self._processes]
        meeting = {"ranks": ranks, "meeting": str(folder / "meeting")}
        for rank, process in enumerate(self._processes):
            self._send(process, {"rank": rank, "device": device, **meeting})

    def ask(self, do: str, *, timeout_s: float = 900.0, **arguments: object) -> list[dict[str, Any]]:
        """The replies of all ranks to one request.

        Raises:
            CrewError: a process ended, or none of its replies came in time.
        """
        for process in self._processes:
            self._send(process, {"do": do, **arguments})
        return [self._reply(rank, do, timeout_s) for rank in range(len(self._processes))]

    def close(self) -> None:
        """End the processes, gently first; their pipes are closed."""
        for process in self._processes:
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    continue
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, process: subprocess.Popen[str], message: Mapping[str, object]) -> None:
        assert process.stdin is not None  # a pipe was asked for
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return  # it ended; the missing reply says so

    def _reply(self, rank: int, do: str, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._replies[rank].get(timeout=timeout_s)
        except queue.Empty:
            raise CrewError(f"no answer to {do!r} within {timeout_s:.0f} s") from None
        if not line:
            self._replies[rank].put("")  # whoever asks it again learns the same
            code = self._processes[rank].wait(timeout=60)
            raise CrewError(f"ended with exit code {code} at {do!r}: {_end_of(self._logs[rank])}")
        return json.loads(line)


def quiet_environment(threads: int) -> dict[str, str]:
    """Variables of every contestant: a number of threads, no spinning while one waits, no network."""
    count = str(threads)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        # A waiting thread that spins would count as work.
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        # A pool of compiling processes would outlive the compilation and take memory beside the contestant.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


def _start(log: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables,
            text=True,
        )


def _read(process: subprocess.Popen[str]) -> "queue.Queue[str]":
    """Replies of a process as they come; an empty one is its end."""
    replies: queue.Queue[str] = queue.Queue()

    def collect() -> None:
        assert process.stdout is not None  # a pipe was asked for
        with process.stdout as stream:
            for line in stream:
                replies.put(line)
        replies.put("")

    threading.Thread(target=collect, daemon=True).start()
    return replies


def _end_of(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:])
