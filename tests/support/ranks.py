"""Runs a function on several real ranks (processes, gloo), cheaply."""

from collections.abc import Callable
from typing import Any

from megatron_klrl.launch.forked import RankFailedError, run_forked, start_server

TIMEOUT_S = 120


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``size`` ranks that share a rendezvous; results in rank order.

    ``function`` must be importable (module level) and joins the world by itself. A rank that raises fails the test with
    that rank's traceback.
    """
    start_server(["tests.support.preload"])
    try:
        return run_forked(size, function, *args, timeout_s=TIMEOUT_S)
    except RankFailedError as failure:
        raise AssertionError(str(failure)) from None
