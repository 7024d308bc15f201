"""Real signals to real processes."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_klrl.runtime.stop import clear_unfinished, write_unfinished


def run(body: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal\nfrom megatron_klrl.runtime.stop import STOPS, listen\nme = os.getpid()\n"
    program = head + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_any_number_of_signals_is_one_request() -> None:
    done = run(
        """
        request = listen(has_launcher=True)
        print(request.number)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(me, number)
            print(request.number)
        """
    )
    usr1, term = int(signal.SIGUSR1), int(signal.SIGTERM)
    assert (done.returncode, done.stdout.split()) == (0, [str(n) for n in (0, usr1, term, term, term, term)])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_came_before_a_rank_listens_counts(number: signal.Signals) -> None:
    done = run(
        f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        os.kill(me, {number.value})
        print(listen(has_launcher=True).number)
        """
    )
    assert (done.returncode, done.stdout) == (0, f"{number.value}\n")


def test_the_second_sigterm_ends_a_process_that_nobody_else_would() -> None:
    body = "listen(has_launcher=False)\nos.kill(me, signal.SIGTERM)\nprint('on')\n"
    assert run(body).stdout == "on\n"
    assert run(body + "os.kill(me, signal.SIGUSR1)\nprint('and on')").stdout == "on\nand on\n"
    twice = run(body + "os.kill(me, signal.SIGTERM)\nprint('never')")
    assert (twice.returncode, "never" in twice.stdout) == (-signal.SIGTERM, False)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_while_python_ends_does_not_end_it_otherwise(number: signal.Signals) -> None:
    """What a module holds is deleted after Python has put handlers back; a batch script may repeat its signal then."""
    done = run(
        f"""
        class Last:
            def __del__(self, kill=os.kill, me=me, write=os.write):
                kill(me, {number.value})
                write(1, b"last")

        last = Last()
        listen(has_launcher=True)
        """
    )
    assert (done.returncode, done.stdout) == (0, "last")


def test_the_file_says_how_far_a_run_got_until_it_starts_again(tmp_path: Path) -> None:
    write_unfinished(tmp_path, step=3, steps=9, number=signal.SIGUSR1)
    (file,) = tmp_path.iterdir()
    assert file.name == "unfinished.json"
    assert json.loads(file.read_text()) == {"step": 3, "steps": 9, "signal": "SIGUSR1"}
    clear_unfinished(tmp_path)
    clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []
