"""Stands in for the trainer where a test is about SLURM: counts steps, saves, listens to signals as the trainer does.

Run as the Python of a job's virtual environment (see `conftest.py`), it gets the whole command line of torchrun, one
process a node, and takes from it what klrl was asked to do.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_S = 0.1


def note(folder: Path, text: str) -> None:
    """One line of what happened; small appended lines of several processes do not mix."""
    with (folder / "notes.txt").open("a", encoding="utf-8") as file:
        file.write(f"{os.environ['SLURMD_NODENAME']} start {os.environ.get('SLURM_RESTART_COUNT', '0')} {text}\n")


def train(folder: Path) -> None:
    """As many steps as the environment says; the first process saves."""
    heard: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: heard.append(signum))
    saved, first = folder / "saved.json", os.environ["SLURM_PROCID"] == "0"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    steps = int(os.environ["STUB_STEPS"])
    note(folder, f"from {step}")
    while step < steps and not heard:
        time.sleep(STEP_S)
        step += 1
        if first:
            draft = saved.with_suffix(".new")
            draft.write_text(json.dumps({"step": step}))
            draft.replace(saved)
    if heard and first:
        name = signal.Signals(heard[0]).name
        (folder / "unfinished.json").write_text(json.dumps({"step": step, "steps": steps, "signal": name}))
    note(folder, f"until {step}{' told' if heard else ''}")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a Python that ends puts handlers back, and a late signal would kill it


def shard(folder: Path, which: str) -> None:
    """One shard of a study; a file named slow keeps it busy for a while."""
    folder.mkdir(exist_ok=True)
    note(folder, f"shard {which} begins")
    while (folder / "slow").exists():
        time.sleep(STEP_S)
    note(folder, f"shard {which} ends")


def main(arguments: list[str]) -> None:
    """Find klrl's command in torchrun's, and do it."""
    command = arguments[arguments.index("megatron_klrl.cli") + 1 :]
    if command[0] == "study":
        shard(Path(command[command.index("--out") + 1]), command[command.index("--shard") + 1])
    else:
        train(Path(command[command.index("--run-dir") + 1]))


main(sys.argv[1:])
