"""Runs a function on several real ranks (processes, gloo), cheaply."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 120
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``size`` ranks that share a rendezvous; results in rank order.

    ``function`` must be importable (module level) and joins the world by itself. A rank that raises fails the test with
    that rank's traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_rank, args=(rank, size, port, pipes[rank][1], function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return [_receive(rank, receiver) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _receive(rank: int, receiver: Connection) -> Any:
    if not receiver.poll(TIMEOUT_S):
        raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s")
    ok, value = pickle.loads(receiver.recv_bytes())
    if not ok:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _rank(rank: int, size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        answer = (True, function(*args))
    except BaseException:  # noqa: BLE001  whatever it is, the test must show it
        answer = (False, traceback.format_exc())
    # plain pickle: multiprocessing's own would share tensors through this process, which is about to end
    sender.send_bytes(pickle.dumps(answer))
