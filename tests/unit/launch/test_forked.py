"""Ranks forked from a server: results in order, and every way to fail ends the call with the rank's own words."""

import os
import time

import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.launch.forked import RankFailedError, run_forked, start_server


@pytest.fixture(autouse=True)
def _server() -> None:
    start_server(["tests.support.preload"])


def rank_and_world(offset: int) -> tuple[int, int]:
    return int(os.environ["RANK"]) + offset, int(os.environ["WORLD_SIZE"])


def fail_on_last(kind: str) -> None:
    if os.environ["RANK"] != "1":
        time.sleep(60)  # as in a collective that the failed rank never joins
    if kind == "user":
        raise UserError("is wrong", field="kl.beta", fix="mend it")
    if kind == "dies":
        os.kill(os.getpid(), 9)


def test_results_come_in_rank_order() -> None:
    assert run_forked(3, rank_and_world, 10, timeout_s=60) == [(10, 3), (11, 3), (12, 3)]


def test_a_failing_rank_ends_the_wait_for_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 failed") as caught:
        run_forked(2, fail_on_last, "user", timeout_s=60)
    assert isinstance(caught.value.error, UserError)
    assert caught.value.error.field == "kl.beta"
    assert time.monotonic() - start < 30


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailedError, match="rank 1 died without a word"):
        run_forked(2, fail_on_last, "dies", timeout_s=60)


def test_ranks_that_hang_are_named() -> None:
    with pytest.raises(RankFailedError, match="rank 0 did not answer within 1 s"):
        run_forked(1, time.sleep, 60, timeout_s=1)
