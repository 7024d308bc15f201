"""What a reading counts: the process's own work and memory, and nothing that the inputs took before."""

import mmap
import time

from benchmarks.harness.meters import read_cpu

MIB = 2**20


def taken(mebibytes: int) -> mmap.mmap:
    """Memory from the system itself, every page written: what a heap keeps of freed blocks depends on its history."""
    block = mmap.mmap(-1, mebibytes * MIB)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return block


def test_the_peak_is_what_a_call_needs_on_top_of_its_inputs() -> None:
    held = taken(32)

    def call() -> None:
        taken(64).close()
        taken(len(held) // MIB).close()

    reading = read_cpu(call, restore=lambda: None, calls=2)
    # page tables, and what the interpreter itself takes meanwhile
    assert 62 * MIB <= reading.peak_bytes <= 72 * MIB


def test_results_count() -> None:
    kept: list[mmap.mmap] = []
    reading = read_cpu(lambda: kept.append(taken(32)), restore=lambda: None, calls=2)
    assert 62 * MIB <= reading.peak_bytes <= 72 * MIB


def test_a_peak_of_before_is_forgotten() -> None:
    taken(128).close()
    assert read_cpu(lambda: None, restore=lambda: None, calls=1).peak_bytes < 8 * MIB


def test_waiting_is_not_work() -> None:
    reading = read_cpu(lambda: time.sleep(0.1), restore=lambda: None, calls=1)
    assert reading.wall_s >= 0.1
    assert reading.seconds < 0.05


def test_inputs_are_restored_before_every_call_and_the_time_for_it_does_not_count() -> None:
    order: list[str] = []

    def restore() -> None:
        order.append("restore")
        time.sleep(0.1)

    reading = read_cpu(lambda: order.append("call"), restore=restore, calls=2)
    assert order == ["restore", "call", "restore", "call"]
    assert reading.wall_s < 0.1
