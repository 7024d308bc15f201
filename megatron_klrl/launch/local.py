"""Start the ranks of a run on this machine, watch them, and end with one message and the right exit code.

Beside torchrun because a user's error must reach the shell as exit code 2 and one sentence, and because nothing heavy
is imported before the first rank starts.
"""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_klrl.errors import WorkError
from megatron_klrl.launch.failure import EXIT_CODES, clear_failure, read_failure
from megatron_klrl.runtime.logs import log_file
from megatron_klrl.runtime.place import last_place, place_file

RUN_DIR_VARIABLE = "KLRL_RUN_DIR"
COMMAND = (sys.executable, "-m", "megatron_klrl.cli")
_POLL_S = 0.05
_PORTS, _TRIES = (15000, 30000), 100
_LAST_WORDS_S = 2.0  # ranks that lose one of them say where they were, and clean up
_TAIL_LINES = 5
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child should not load libraries


@dataclass(slots=True)
class _Watch:
    """What the parent has seen so far; the only mutable state of the launcher."""

    stops: frozenset[int]
    pending: list[int] = field(default_factory=list)
    forwarded: list[int] = field(default_factory=list)
    own_end: dict[int, int] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    kill_at: float | None = None


def run_ranks(
    argv: Sequence[str],
    ranks: int,
    run_dir: Path,
    *,
    command: Sequence[str] = COMMAND,
    grace_s: float = 10.0,
    stops: Iterable[signal.Signals] = (),
    report: Callable[[str], object] | None = None,
) -> int:
    """Run `command` + `argv` in `ranks` processes and wait for all of them.

    Rank 0 has this process's output; rank n writes to ``run_dir/logs/rankN.txt``. When a rank fails, the others are
    terminated, and killed `grace_s` seconds later. SIGINT and SIGTERM are forwarded; on a second one the ranks have
    `grace_s` seconds left. A rank dies with this process, however that ends.

    Signals in `stops` ask the ranks to stop in their own time. They are forwarded too, to the ranks alone and not to
    what these started, and wait in a rank until it listens. Ranks that take SIGTERM so are killed when another fails,
    after two seconds for last words.

    Args:
        argv: arguments of the command, the same for each rank.
        ranks: number of processes, at least 1.
        run_dir: existing folder of the run.
        command: program and first arguments.
        grace_s: seconds between asking ranks to end and killing them.
        stops: signals that `command` takes as a request.
        report: receives each message to the user; standard error if None.

    Returns:
        0 if all ranks ended well; 2 or 1 if a rank wrote error.json of kind user or work; else the worst exit code of
        the ranks that ended by themselves (128 + n for signal n).
    """
    clear_failure(run_dir)
    (run_dir / "logs").mkdir(exist_ok=True)
    _forget_places(ranks, run_dir)  # of a start whose launcher was killed
    watch = _Watch(stops=frozenset(stops))
    processes: list[subprocess.Popen[bytes]] = []
    with _signals_into(watch):
        try:
            port = _free_port()
            for rank in range(ranks):
                environment = _environment(rank, ranks, port, run_dir)
                processes.append(_start([*command, *argv], environment, rank, run_dir, blocked=watch.stops))
            _wait(processes, watch, grace_s)
        finally:
            _kill(processes)
    try:
        return _conclude(watch, run_dir, report or _to_stderr)
    finally:
        _forget_places(ranks, run_dir)


def _forget_places(ranks: int, run_dir: Path) -> None:
    for rank in range(ranks):
        place_file(run_dir, rank).unlink(missing_ok=True)


def _environment(rank: int, ranks: int, port: int, run_dir: Path) -> dict[str, str]:
    placed = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        RUN_DIR_VARIABLE: str(run_dir),
    }
    # One thread a rank: ranks share the cores, and torch in each would otherwise take all of them.
    defaults: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**defaults, **os.environ, **placed}


def _free_port() -> int:
    """Free now and, below those that the system hands out, most likely still when the first rank has come to bind it.

    That is half a minute later: a port of the system's choice may be somebody's connection by then.
    """
    draw = random.SystemRandom()  # another run of the same seed must not draw the same
    for _ in range(_TRIES):
        port = draw.randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise WorkError(f"no free port among {_TRIES} tried from {_PORTS[0]} to {_PORTS[1]} on 127.0.0.1")


def _start(
    command: list[str], environment: dict[str, str], rank: int, run_dir: Path, *, blocked: frozenset[int]
) -> subprocess.Popen[bytes]:
    with log_file(run_dir, rank).open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=None if rank == 0 else log,
            stderr=None if rank == 0 else log,
            # An own session: Ctrl-C reaches the ranks once, through us, and killing takes their children too.
            start_new_session=True,
            preexec_fn=partial(_in_child, blocked),  # noqa: PLW1509  this process has no threads
        )


def _in_child(blocked: frozenset[int]) -> None:
    """Die with the parent; keep for later what would end a process that does not listen yet."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)


def die_with_parent() -> None:
    """In a child, before it runs its program: the kernel kills it when this process ends, however that comes."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _signals_into(watch: _Watch) -> Iterator[None]:
    def note(signum: int, _frame: FrameType | None) -> None:
        watch.pending.append(signum)

    numbers = {signal.SIGINT, signal.SIGTERM, *watch.stops}
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]], watch: _Watch, grace_s: float) -> None:
    """Until all ranks have ended."""
    while len(watch.own_end) + len(watch.stopped) < len(processes):
        _collect(processes, watch)
        _forward(processes, watch, grace_s)
        failed = any(watch.own_end.values())
        if failed and watch.kill_at is None:
            _end_the_others(processes, watch, grace_s)
        if watch.kill_at is not None and time.monotonic() > watch.kill_at:
            _kill(processes)
        time.sleep(_POLL_S)


def _end_the_others(processes: list[subprocess.Popen[bytes]], watch: _Watch, grace_s: float) -> None:
    if signal.SIGTERM in watch.stops:  # they would take it for a request to stop after a step that cannot end
        watch.kill_at = time.monotonic() + _LAST_WORDS_S
    else:
        _signal_all(processes, signal.SIGTERM)
        watch.kill_at = time.monotonic() + grace_s


def _collect(processes: list[subprocess.Popen[bytes]], watch: _Watch) -> None:
    """Note who has ended; after the ranks were told to end, how they do says nothing."""
    told_to_end = watch.kill_at is not None
    for rank, process in enumerate(processes):
        if rank in watch.own_end or rank in watch.stopped or process.poll() is None:
            continue
        if told_to_end:
            watch.stopped.add(rank)
        else:
            watch.own_end[rank] = process.returncode


def _forward(processes: list[subprocess.Popen[bytes]], watch: _Watch, grace_s: float) -> None:
    while watch.pending:
        number = watch.pending.pop(0)
        if number != signal.SIGUSR1 and {*watch.forwarded} - {signal.SIGUSR1} and watch.kill_at is None:
            watch.kill_at = time.monotonic() + grace_s
        watch.forwarded.append(number)
        _signal_all(processes, number, alone=number in watch.stops)


def _signal_all(processes: list[subprocess.Popen[bytes]], number: int, *, alone: bool = False) -> None:
    """To every rank that runs: with all that it started, or to it alone."""
    for process in processes:
        if process.poll() is not None:
            continue
        if alone:
            process.send_signal(number)
        else:
            _signal_group(process, number)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        process.send_signal(number)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks and what they started, also what a rank that has ended left running."""
    for process in processes:
        _signal_group(process, signal.SIGKILL)
    for process in processes:
        process.wait()


def _to_stderr(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def _conclude(watch: _Watch, run_dir: Path, report: Callable[[str], object]) -> int:
    failure = read_failure(run_dir)
    asked = set(watch.forwarded)
    dead = [(rank, -code) for rank, code in sorted(watch.own_end.items()) if code < 0 and -code not in asked]
    if failure is not None and dead:  # the others' failure is what its death looks like to them: it tells the phase
        told = (f"{_death(rank, number, run_dir)} (its log: {log_file(run_dir, rank)})" for rank, number in dead)
        report(f"{'; '.join(told)}. Then {failure.message}")
        return EXIT_CODES[failure.kind]
    for rank, number in dead:
        report(f"{_death(rank, number, run_dir)}{_output_of(rank, run_dir)}")
    if failure is not None:
        report(failure.message)
        return EXIT_CODES[failure.kind]
    ended_well = not watch.stopped and not any(watch.own_end.values())
    if asked and not ended_well:
        number = watch.forwarded[0]
        report(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    for rank, code in sorted(watch.own_end.items()):
        if code > 0:
            report(f"rank {rank} ended with exit code {code}{_output_of(rank, run_dir)}")
    return max((code if code >= 0 else 128 - code for code in watch.own_end.values()), default=0)


def _death(rank: int, number: int, run_dir: Path) -> str:
    place = last_place(run_dir, rank)
    hint = " (often the machine is out of memory)" if number == signal.SIGKILL else ""
    return f"rank {rank} was killed by {signal.Signals(number).name}{hint}{f', in {place}' if place else ''}"


def _output_of(rank: int, run_dir: Path) -> str:
    """Where the output of a rank is, with its last lines; rank 0 may have written to the terminal only."""
    file = log_file(run_dir, rank)
    if not file.stat().st_size:
        return ""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "".join([f"; its output is in {file}", *(f"\n  | {line}" for line in lines)])
