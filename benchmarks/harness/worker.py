"""A contestant's own process: makes the inputs, shows that its answer is right, and does the work when it is told to.

Reads one JSON object a line from stdin and answers with one on what was stdout; whatever a library prints goes
to stderr. The first object is the job, the others name a command of `Worker`.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol, TextIO

import torch

from benchmarks.harness.ceilings import ceilings
from benchmarks.harness.meters import read_cpu, read_cuda, return_free_memory
from benchmarks.harness.parity import Answer, differences
from benchmarks.harness.ranks import join_ranks


class Workload(Protocol):
    """Inputs of a case, the same in every process."""

    def restore(self) -> None:
        """Make inputs whole that a contestant has written over."""

    def truth(self) -> Answer:
        """The answer, computed in float64."""

    def size(self) -> Mapping[str, float]:
        """``input_bytes`` that peaks are compared with, and ``least_bytes``, ``least_flops`` that the work takes."""


class Worker:
    """The commands, each a method that takes and returns JSON objects."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.workload: Workload | None = None
        self.step: Callable[[], Answer] | None = None
        self.device = "cpu"

    def prepare(self, *, workload: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Make the inputs."""
        self.device = str(parameters.get("device", "cpu"))
        self.workload = _named(workload)(**parameters)
        return dict(self.workload.size())

    def enter(self, *, factory: str, options: dict[str, Any]) -> dict[str, Any]:
        """Import the contestant and hand it the inputs; the reply names a module that is missing."""
        try:
            self.step = _named(factory)(self.workload, **options)
        except ModuleNotFoundError as error:
            return {"missing": str(error.name), "message": str(error)}
        return {}

    def truth(self, *, path: str) -> dict[str, Any]:
        """Write this rank's float64 answer to a file."""
        self._workload().truth().save(self._of_rank(path))
        return {}

    def parity(self, *, path: str | None) -> dict[str, Any]:
        """Do the work once, unmeasured, and say how far the answer is from the truth in the file, or made here."""
        workload = self._workload()
        truth = Answer.load(self._of_rank(path)) if path is not None else workload.truth()
        workload.restore()
        answer = self._step()()
        found = differences(answer, truth)
        del answer, truth
        return_free_memory()
        return found

    def measure(self, *, calls: int) -> dict[str, Any]:
        """Do the work ``calls`` times and say what it took."""
        read = read_cuda if self.device == "cuda" else read_cpu
        return asdict(read(self._step(), restore=self._workload().restore, calls=calls))

    def ceilings(self, *, device: str) -> dict[str, Any]:
        """What the machine can do at best."""
        found: dict[str, Any] = ceilings(device)
        if device == "cuda":
            found["device"] = torch.cuda.get_device_name()
        return found

    def _of_rank(self, path: str) -> str:
        return f"{path}.rank{self.rank}"

    def _workload(self) -> Workload:
        if self.workload is None:
            raise RuntimeError("prepare comes first")
        return self.workload

    def _step(self) -> Callable[[], Answer]:
        if self.step is None:
            raise RuntimeError("enter comes first")
        return self.step


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def serve(worker: Worker, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Entry point of ``python -m benchmarks.harness.worker``."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = json.loads(sys.stdin.readline())
    with join_ranks(**job):
        serve(Worker(job["rank"]), sys.stdin, replies)


if __name__ == "__main__":
    main()
