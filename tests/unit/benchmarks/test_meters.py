"""What a reading counts: the process's own work and memory, and nothing that the inputs took before."""

import time

import torch

from benchmarks.harness.meters import read_cpu

MIB = 2**20


def test_the_peak_is_what_a_call_needs_on_top_of_its_inputs() -> None:
    held = torch.ones(32 * MIB, dtype=torch.uint8)

    def call() -> torch.Tensor:
        passing = torch.ones(64 * MIB, dtype=torch.uint8)
        del passing
        return held.clone()

    reading = read_cpu(call, restore=lambda: None, calls=2)
    # page tables, and what the allocator keeps between its blocks
    assert 62 * MIB <= reading.peak_bytes <= 80 * MIB


def test_a_peak_of_before_is_forgotten() -> None:
    torch.ones(128 * MIB, dtype=torch.uint8)
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
