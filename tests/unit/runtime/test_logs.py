"""Standard error goes to the log while the body runs, and back afterwards."""

import os
from pathlib import Path

import pytest

from megatron_klrl.runtime.logs import stderr_into


def test_chatter_goes_to_the_file_and_the_terminal_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stderr_into(tmp_path / "logs" / "log.txt"):
        os.write(2, b"chatter of a C library\n")
    os.write(2, b"for the user\n")
    assert (tmp_path / "logs" / "log.txt").read_text() == "chatter of a C library\n"
    assert capfd.readouterr().err == "for the user\n"


def test_it_comes_back_after_an_exception(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), stderr_into(tmp_path / "log.txt"):
        raise RuntimeError
    os.write(2, b"for the user\n")
    assert capfd.readouterr().err == "for the user\n"
