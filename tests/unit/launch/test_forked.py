"""Ranks forked from a server: results in order, and every way to fail ends the call with the rank's own words."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

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


def meets_although_it_is_taken(rank_zero_port: str) -> list[bool]:
    """Whether others are kept from the port, before the ranks meet there and while they do."""
    port = int(os.environ[rank_zero_port])
    found = []
    for _ in range(2):
        with socket.socket() as other:
            try:
                other.bind(("127.0.0.1", port))
                found.append(False)
            except OSError:
                found.append(True)
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_the_port_where_ranks_meet_is_theirs_from_the_start() -> None:
    assert run_forked(2, meets_although_it_is_taken, "MASTER_PORT", timeout_s=60) == [[True, True], [True, True]]
