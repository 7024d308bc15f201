"""Verifier processes that answer, raise, hang in Python, hang in C, and die."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_klrl.errors import WorkError
from megatron_klrl.tasks.task import Verdicts
from megatron_klrl.tasks.verifier_pool import VerifierPool


def behave(what: str, value: float) -> float:
    """What a verifier may do."""
    match what:
        case "give":
            return value
        case "raise":
            raise ValueError(value)
        case "sleep":
            time.sleep(600)
        case "swallow":  # a loop that eats every exception, the alarm's too
            while True:
                with suppress(BaseException):
                    time.sleep(600)
        case "deaf":  # as one long call in C: the alarm is not heard
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(600)
        case "die":
            os._exit(3)
        case "print":
            os.write(1, b"printed")
            return value
    return float(what)


@dataclass(frozen=True)
class Behaving:
    """The verifier of this test."""

    def load(self) -> Callable[..., float]:
        return behave


@dataclass(frozen=True)
class Broken:
    """One that cannot be loaded."""

    def load(self) -> Callable[..., float]:
        raise ImportError("no module named nowhere")


@pytest.fixture
def pool():
    pool = VerifierPool(Behaving(), workers=2, timeout_s=1.0)
    yield pool
    pool.close()


def test_rewards_come_in_the_order_of_the_cases(pool: VerifierPool) -> None:
    assert pool.score([]) == Verdicts(rewards=[])
    assert pool.score([("give", float(number)) for number in range(20)]).rewards == list(map(float, range(20)))


def test_what_hangs_raises_or_dies_gets_0_and_is_counted_and_the_others_are_not_touched(pool: VerifierPool) -> None:
    bad = ["sleep", "raise", "deaf", "swallow", "die", "nan", "inf"]
    cases = [(what, 1.0) for name in bad for what in (name, "give")]
    found = pool.score(cases)
    assert found.rewards == [0.0, 1.0] * len(bad)
    assert (found.timeouts, found.errors) == (3, 4)
    assert pool.score([("give", 0.25)] * 3) == Verdicts(rewards=[0.25] * 3), "the processes were replaced"


def test_a_timeout_that_the_process_survives_does_not_cost_a_new_process(pool: VerifierPool) -> None:
    pool.score([("give", 1.0)] * 2)
    before = {worker._process.pid for worker in pool._workers}
    assert pool.score([("sleep", 1.0), ("raise", 1.0)]) == Verdicts(rewards=[0.0, 0.0], timeouts=1, errors=1)
    assert {worker._process.pid for worker in pool._workers} == before
    assert pool.score([("deaf", 1.0)]).timeouts == 1
    assert {worker._process.pid for worker in pool._workers} != before


def test_a_verifier_that_cannot_be_loaded_is_an_error_and_no_reward() -> None:
    with pytest.raises(WorkError, match="did not start: ImportError: no module named nowhere"):
        VerifierPool(Broken(), workers=2, timeout_s=1.0).score([("give", 1.0)] * 3)


def test_standard_output_stays_clean(pool: VerifierPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert pool.score([("print", 1.0)]).rewards == [1.0]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "printed")


def test_processes_end_with_the_pool(pool: VerifierPool) -> None:
    pool.score([("give", 1.0)] * 2)
    pids = [worker._process.pid for worker in pool._workers]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
