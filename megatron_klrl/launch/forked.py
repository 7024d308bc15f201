"""A function on several ranks of this machine, forked from a server that has the heavy imports behind it.

Four ranks start in under a second, where processes of their own would spend ten on imports. The server is started once
and serves every call; it touches no device, so its children may.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_END_S = 5.0


class RankFailedError(Exception):
    """A rank raised, died or did not answer in time.

    Attributes:
        error: what it raised, where that can be told; None otherwise.
    """

    def __init__(self, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.error = error


def start_server(preload: Sequence[str]) -> None:
    """Start the server with these modules imported; later calls do nothing.

    Its standard error, and that of all ranks that do not say otherwise, is this process's at the time of this call.
    """
    _context.set_forkserver_preload(list(preload))
    forkserver.ensure_running()


def run_forked(size: int, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
    """Call ``function(*args)`` on ``size`` ranks that share a rendezvous; results in rank order.

    Args:
        size: number of ranks.
        function: importable (module level); joins the world by itself.
        args: picklable.
        timeout_s: for all of it.

    Raises:
        RankFailedError: with the failing rank's traceback.
    """
    with _reserved_port() as port:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(target=_rank, args=(rank, size, port, sender, function, args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # so that a rank that dies ends its pipe
        try:
            return _answers([receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.join(_END_S)
                if process.is_alive():
                    process.kill()


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that the system hands to nobody else, while the first rank can listen on it.

    One that was only found free would be somebody's connection now and then: seconds pass until it is bound. A socket
    that shares its address, as torch's store does, may listen over one that shares it too and does not listen.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _answers(receivers: list[Connection], timeout_s: float) -> list[Any]:
    """In rank order; the first failure ends the wait, since the others may hang in a collective without that rank."""
    found: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    while len(found) < len(receivers):
        waiting = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in found}
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            late = ", ".join(str(rank) for rank in waiting.values())
            raise RankFailedError(f"rank {late} did not answer within {timeout_s:g} s")
        for receiver in ready:
            found[waiting[receiver]] = _answer(waiting[receiver], receiver)  # type: ignore[index]
    return [found[rank] for rank in range(len(receivers))]


def _answer(rank: int, receiver: Any) -> Any:
    try:
        ok, value, text = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise RankFailedError(f"rank {rank} died without a word") from None
    if not ok:
        raise RankFailedError(f"rank {rank} failed:\n{text}", value)
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
        answer = (True, function(*args), "")
    except BaseException as error:  # noqa: BLE001  whatever it is, the caller must hear of it
        answer = (False, _portable(error), traceback.format_exc())
    # plain pickle: multiprocessing's own would share tensors through this process, which is about to end
    sender.send_bytes(pickle.dumps(answer))


def _portable(error: BaseException) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  an exception's pickling may raise anything
        return None
    return error
