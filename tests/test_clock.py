"""The training clock, on a fake source of time."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_fast.clock import TrainingClock, process_age_s


class FakeTime:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def run(cap_s, reserve_s, step_times, check_every):
    """A training loop reduced to its clock: train until the clock says stop. Returns training seconds used and steps done."""
    now = FakeTime()
    clock = TrainingClock(cap_s, reserve_s, now)
    clock.observe_steps(1, max(step_times))  # the warm-up has seen the slowest ordinary step
    done = 0
    with clock.phase("train"):
        while done < 10_000:
            allowed = clock.steps_left(clock.elapsed_s, clock.slowest_step_s, check_every)
            if allowed == 0:
                break
            before = now.seconds
            for _ in range(allowed):
                now.seconds += step_times[done % len(step_times)]
                done += 1
            clock.observe_steps(allowed, now.seconds - before)
            clock.observe_steps(1, max(step_times))
            with clock.phase("validate"):
                now.seconds += 7.0
    return clock.ledger_s["train"], done


@given(
    cap_s=st.floats(0.5, 600),
    reserve_s=st.floats(0, 10),
    step_times=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=40),
    check_every=st.integers(1, 20),
)
def test_no_run_ends_past_its_cap(cap_s, reserve_s, step_times, check_every):
    used, _ = run(cap_s, reserve_s, step_times, check_every)
    assert used <= max(0.0, cap_s - reserve_s) + 1e-6


@given(step_s=st.floats(0.01, 1.0), cap_s=st.floats(1, 600))
def test_steady_steps_use_all_but_the_last_step(step_s, cap_s):
    used, done = run(cap_s, 0.0, [step_s], 10)
    assert done == 10_000 or used > cap_s - step_s - 1e-6


def test_a_slower_step_than_any_before_is_what_the_reserve_is_for():
    now = FakeTime()
    clock = TrainingClock(10.0, 0.5, now)
    clock.observe_steps(1, 1.0)
    with clock.phase("train"):
        while clock.steps_left(clock.elapsed_s, clock.slowest_step_s, 1):
            now.seconds += 1.0 if clock.elapsed_s < 8 else 1.5
    assert clock.ledger_s["train"] <= 10.0


def test_phases_inside_training_do_not_count():
    now = FakeTime()
    clock = TrainingClock(0, now=now)
    with clock.phase("train"):
        now.seconds += 3
        with clock.phase("validate"):
            now.seconds += 5
            assert clock.elapsed_s == 3
        now.seconds += 2
        assert clock.elapsed_s == 5
        assert clock.state()["ledger_s"] == {"train": 5, "validate": 5}
    assert dict(clock.ledger_s) == {"train": 5, "validate": 5}


def test_a_resumed_clock_goes_on():
    now = FakeTime()
    first = TrainingClock(10, now=now)
    first.observe_steps(1, 0.25)
    with first.phase("train"):
        now.seconds += 4
        state = first.state()
    second = TrainingClock(10, now=now)
    second.restore(state)
    assert second.elapsed_s == 4 and second.slowest_step_s == 0.25


def test_without_a_cap_nothing_stops():
    assert TrainingClock(0).steps_left(1e9, 1.0, 7) == 7


@pytest.mark.skipif(not os.path.exists("/proc/uptime"), reason="needs a system that says when a process began")
def test_a_process_is_as_old_as_the_torchrun_above_it():
    time.sleep(max(0.0, 0.5 - process_age_s()))
    code = "from pgolf_fast.clock import process_age_s; import os; print(process_age_s())"
    ages = []
    for told in ({}, {"TORCHELASTIC_RUN_ID": "here the process of the tests"}):
        begin = time.perf_counter()
        ages.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | told).stdout))
        taken = time.perf_counter() - begin
    assert 0 <= ages[0] < taken + 5 and ages[1] == pytest.approx(process_age_s(), abs=taken + 0.5)
