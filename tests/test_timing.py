"""The timing harness, with contestants whose cost is known."""

import time

import torch

from benchmarks.timing import Case, Ceilings, rotations_for, time_contestants


def test_it_sees_which_contestant_is_slower_and_by_how_much():
    case = Case("sleep", {"short": lambda i: time.sleep(0.002), "long": lambda i: time.sleep(0.006)})
    timings = time_contestants(case, torch.device("cpu"), budget_s=0.2)
    assert 2.5 < timings["long"].median_us / timings["short"].median_us < 3.5
    assert timings["short"].p20_us <= timings["short"].median_us <= timings["short"].p80_us


def test_rotations_are_all_used():
    seen = set()
    time_contestants(Case("touch", {"ours": seen.add}, rotations=3), torch.device("cpu"), budget_s=0.05)
    assert seen == {0, 1, 2}


def test_rotations_flush_the_cache():
    assert rotations_for(1e9) == 1
    assert rotations_for(1e7) * 1e7 >= 4 * 60e6


def test_the_floor_is_the_harder_limit():
    ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e12)
    assert ceilings.floor_us(Case("bytes", {}, bytes=1e6, flops=1e6)) == 1000
    assert ceilings.floor_us(Case("flops", {}, bytes=1, flops=1e9)) == 1000
