"""Tiny Python programs as ranks: real processes, real signals."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_klrl.launch import local
from megatron_klrl.launch.failure import Failure, read_failure, write_failure
from megatron_klrl.launch.local import run_ranks
from megatron_klrl.runtime.stop import STOPS

LISTEN = """
from megatron_klrl.runtime.stop import listen
request = listen(has_launcher=True)
"""
FAIL = """
from pathlib import Path
from megatron_klrl.launch.failure import Failure, write_failure
def fail(kind, message):
    write_failure(Path(os.environ["KLRL_RUN_DIR"]), Failure(kind=kind, rank=rank, message=message))
"""


def start(
    run_dir: Path, body: str, *, ranks: int = 2, grace_s: float = 5.0, stops: tuple[signal.Signals, ...] = ()
) -> tuple[int, list[str]]:
    program = "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body)
    messages: list[str] = []
    command = (sys.executable, "-c", program)
    code = run_ranks(["a", "b"], ranks, run_dir, command=command, grace_s=grace_s, stops=stops, report=messages.append)
    return code, messages


def log(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank{rank}.txt").read_text()


def test_ranks_know_their_place_and_get_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, messages = start(
        tmp_path,
        """
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS KLRL_RUN_DIR".split()
        print(*[os.environ[name] for name in names], *sys.argv[1:])
        print(os.environ["MASTER_PORT"], file=sys.stderr)
        """,
        ranks=3,
    )
    assert (code, messages) == (0, [])
    first, second = log(tmp_path, 1).splitlines(), log(tmp_path, 2).splitlines()
    assert first[0] == f"1 1 3 3 127.0.0.1 1 {tmp_path} a b"
    assert second[0] == f"2 2 3 3 127.0.0.1 1 {tmp_path} a b"
    assert first[1] == second[1]
    assert 0 < int(first[1]) < 65536


def test_a_thread_count_the_user_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start(tmp_path, "print(os.environ['OMP_NUM_THREADS'])")
    assert log(tmp_path, 1) == "3\n"


def test_rank_zero_has_the_terminal_and_only_rank_zero(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "print('out', rank); print('err', rank, file=sys.stderr)")
    out, err = capfd.readouterr()
    assert (out, err) == ("out 0\n", "err 0\n")
    assert sorted(log(tmp_path, 1).splitlines()) == ["err 1", "out 1"]
    assert (tmp_path / "log.txt").read_text() == "", "rank 0 fills its log itself, if it wants to"


def test_when_one_rank_fails_the_others_are_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    code, messages = start(tmp_path, "if rank == 1: print('last words'); sys.exit(7)\ntime.sleep(60)", ranks=3)
    assert time.monotonic() - began < 10
    assert code == 7
    (message,) = messages
    assert message.startswith("rank 1 ended with exit code 7; its output is in ")
    assert "| last words" in message


def test_a_rank_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        while not os.path.exists(os.environ["KLRL_RUN_DIR"] + "/deaf"): time.sleep(0.01)
        sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.environ["KLRL_RUN_DIR"] + "/deaf", "w").close()
    time.sleep(60)
    """
    began = time.monotonic()
    code, _ = start(tmp_path, body, grace_s=0.5)
    assert code == 3
    assert time.monotonic() - began < 10


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    body = """
    import subprocess
    if rank == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(os.environ["KLRL_RUN_DIR"] + "/child", "w").write(str(child.pid))
    """
    code, _ = start(tmp_path, body, ranks=1)
    assert code == 0
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_rank_killed_by_a_signal_is_named_once(tmp_path: Path) -> None:
    code, messages = start(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert code == 128 + signal.SIGKILL
    (message,) = messages
    assert message.startswith("rank 1 was killed by SIGKILL (often the machine is out of memory)")


@pytest.mark.parametrize(("kind", "expected"), [("user", 2), ("work", 1)])
def test_the_first_error_file_decides_message_and_code(tmp_path: Path, kind: str, expected: int) -> None:
    body = FAIL + f"if rank == 1: fail('{kind}', 'model.path: gone'); sys.exit(9)\ntime.sleep(60)"
    code, messages = start(tmp_path, body)
    assert (code, messages) == (expected, ["model.path: gone"])


def test_an_error_file_of_an_earlier_start_says_nothing(tmp_path: Path) -> None:
    write_failure(tmp_path, Failure(kind="user", rank=0, message="old"))
    assert start(tmp_path, "") == (0, [])
    assert read_failure(tmp_path) is None


def test_only_the_first_writer_is_heard(tmp_path: Path) -> None:
    assert write_failure(tmp_path, Failure(kind="user", rank=1, message="reason"))
    assert not write_failure(tmp_path, Failure(kind="work", rank=0, message="rank 1 is gone"))
    assert read_failure(tmp_path) == Failure(kind="user", rank=1, message="reason")
    assert [entry.name for entry in tmp_path.iterdir()] == ["error.json"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "other", "rank": 0, "message": "x"}'])
def test_an_error_file_that_is_none_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "error.json").write_text(text)
    assert read_failure(tmp_path) is None


def test_a_death_and_what_the_others_say_of_it_are_one_message(tmp_path: Path) -> None:
    body = (
        FAIL
        + """
from megatron_klrl.runtime.place import Places, place_file
with Places(place_file(Path(os.environ["KLRL_RUN_DIR"]), rank)).within("step 3, train"):
    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    fail("work", "rank 0, step 3, train: RuntimeError: connection closed")
    sys.exit(1)
"""
    )
    code, messages = start(tmp_path, body, stops=STOPS)
    assert code == 1
    (message,) = messages
    assert message == (
        "rank 1 was killed by SIGKILL (often the machine is out of memory), in step 3, train "
        f"(its log: {tmp_path}/logs/rank1.txt). Then rank 0, step 3, train: RuntimeError: connection closed"
    )


def test_ranks_that_take_sigterm_as_a_request_are_killed_when_another_fails(tmp_path: Path) -> None:
    body = LISTEN + "if rank == 1: sys.exit(3)\ntime.sleep(60)"
    began = time.monotonic()
    code, _ = start(tmp_path, body, grace_s=60, stops=STOPS)
    assert code == 3
    assert time.monotonic() - began < 15


PARENT = """
import sys
from pathlib import Path
from megatron_klrl.launch.local import run_ranks
from megatron_klrl.runtime.stop import STOPS
command, stops = (sys.executable, "-c", sys.argv[2]), STOPS if sys.argv[4] == "stops" else ()
sys.exit(run_ranks([], 2, Path(sys.argv[1]), command=command, grace_s=float(sys.argv[3]), stops=stops))
"""
# A rank says that it is ready by a file, so that no test waits for a time that may be too short.
READY = "import os, sys, time, signal\nrun = os.environ['KLRL_RUN_DIR']\nrank = os.environ['RANK']\n"
SAY = "open(f'{run}/ready{rank}', 'w').close()\n"


def start_parent(run_dir: Path, body: str, *, grace_s: float = 5.0, stops: str = "no stops") -> subprocess.Popen[str]:
    program = READY + textwrap.dedent(body)
    arguments = [sys.executable, "-c", PARENT, str(run_dir), program, str(grace_s), stops]
    parent = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    wait_for(run_dir / "ready0")
    wait_for(run_dir / "ready1")
    return parent


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
    def note(signum, frame):
        open(f"{{run}}/got{{rank}}", "w").write(str(signum))
        sys.exit(5)
    signal.signal({number.value}, note)
    """
    parent = start_parent(tmp_path, body + "\n    " + SAY + "    time.sleep(60)")
    parent.send_signal(number)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 128 + number
    assert err == f"stopped by {number.name}\n"
    assert {(tmp_path / f"got{rank}").read_text() for rank in (0, 1)} == {str(number.value)}


def test_ranks_that_end_well_on_a_signal_make_a_good_end(tmp_path: Path) -> None:
    body = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{SAY}time.sleep(60)"
    parent = start_parent(tmp_path, body)
    parent.send_signal(signal.SIGTERM)
    assert parent.communicate(timeout=30) == (None, "")
    assert parent.returncode == 0


def test_a_second_signal_ends_ranks_that_ignore_it(tmp_path: Path) -> None:
    body = f"signal.signal(signal.SIGINT, lambda *_: open(f'{{run}}/once{{rank}}', 'w').close())\n{SAY}"
    parent = start_parent(tmp_path, body + "while True: time.sleep(0.1)", grace_s=0.3)
    parent.send_signal(signal.SIGINT)
    wait_for(tmp_path / "once0")
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=30)
    assert (parent.returncode, err) == (130, "stopped by SIGINT\n")


@pytest.mark.parametrize("number", STOPS)
def test_a_request_to_stop_waits_for_a_rank_that_does_not_listen_yet(tmp_path: Path, number: signal.Signals) -> None:
    """And what the rank started does not hear of it."""
    body = f"""
    import subprocess
    {SAY}
    while not os.path.exists(f"{{run}}/sent"): time.sleep(0.01)
    from megatron_klrl.runtime.stop import listen
    request = listen(has_launcher=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while not os.path.exists(f"{{run}}/again"): time.sleep(0.01)
    while len(seen) < 1: seen.append(request.number)
    time.sleep(0.3)
    sys.exit(0 if request.number == {number.value} and child.poll() is None else 1)
    """.replace("import subprocess\n", "import subprocess\n    seen = []\n")
    parent = start_parent(tmp_path, body, stops="stops")
    parent.send_signal(number)
    time.sleep(0.3)  # the parent forwards within a twentieth of a second
    (tmp_path / "sent").touch()
    time.sleep(0.3)
    if number == signal.SIGUSR1:  # a second SIGTERM would be a hard stop
        parent.send_signal(number)
    (tmp_path / "again").touch()
    assert parent.communicate(timeout=30) == (None, "")
    assert parent.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_ranks_that_do_not_stop(tmp_path: Path, second: signal.Signals) -> None:
    body = f"{LISTEN}signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SAY}time.sleep(60)"
    parent = start_parent(tmp_path, body, grace_s=0.3, stops="stops")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        parent.send_signal(number)
        time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(second)
    _, err = parent.communicate(timeout=30)
    assert (parent.returncode, err) == (128 + signal.SIGUSR1, "stopped by SIGUSR1\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_ranks_die_with_a_killed_parent(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, "open(f'{run}/pid{rank}', 'w').write(str(os.getpid()))\n" + SAY + "time.sleep(60)")
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert parent.stderr is not None
    parent.stderr.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start(tmp_path, "", ranks=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ranks_meet_at_a_port_that_the_system_hands_to_nobody() -> None:
    """It is bound half a minute after it was found free."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {local._free_port() for _ in range(20)}
    assert len(ports) > 10, "runs that start together draw apart"
    assert all(1024 < port < lowest for port in ports)
