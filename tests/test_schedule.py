"""Schedules against the published formulas and against steps that the published logs show."""

import dataclasses

import pytest

from pgolf_fast import recipe
from pgolf_fast.errors import UserError
from pgolf_fast.schedule import ScheduleConfig, lr_factor, muon_momentum, plan, progress


def schedule_of(name, **changes) -> ScheduleConfig:
    return dataclasses.replace(recipe.resolve(name, environ={}).recipe.schedule, **changes)


def first_step(config, seconds_per_step, holds, num_steps=8000) -> int:
    """First step of a run of even steps whose plan makes `holds` true."""
    before = None
    for step in range(num_steps):
        before = plan(config, step, step * seconds_per_step, before)
        if holds(before):
            return step
    raise AssertionError("no such step")


# --- step mode: PR #598 ---


def test_gepa_is_linear_in_steps():
    config = schedule_of("gepa-598")
    assert lr_factor(config, 0, 0) == lr_factor(config, 3499, 0) == 1.0
    assert lr_factor(config, 5250, 0) == pytest.approx(0.5)
    assert lr_factor(config, 6476, 0) == pytest.approx(524 / 3500)  # logged: 0.1497
    assert lr_factor(config, 6999, 0) == pytest.approx(1 / 3500)
    assert first_step(config, 1.0, lambda p: p.lr_factor < 1) == 3501


def test_gepa_late_qat_switches_at_the_logged_step():
    assert first_step(schedule_of("gepa-598", late_qat=True), 1.0, lambda p: p.fake_quant) == 6476


# --- clock mode: the mean step of the run stands for its step times, so the logs are met to within a few steps ---

LOGGED = {  # seconds, steps, QAT switch, start of the warm-down
    "gptq-lite-379": (600.02, 6733, 6434, 3733),
    "legal-ttt-691": (600.09, 5436, 4913, 1940),
    "base": (600.04, 7096, 6574, 3600),  # PR #414
}


@pytest.mark.parametrize("name", LOGGED)
def test_clock_schedules_meet_the_logs(name):
    seconds, steps, qat, warmdown = LOGGED[name]
    config = schedule_of(name, late_qat=True)
    assert first_step(config, seconds / steps, lambda p: p.fake_quant) == pytest.approx(qat, abs=5)
    assert first_step(config, seconds / steps, lambda p: p.lr_factor < 1) == pytest.approx(warmdown, abs=10)


def test_clock_schedule_is_remaining_time_over_the_warmdown_window():
    config = schedule_of("legal-ttt-691")
    elapsed, step = 450.0, 4000
    assert lr_factor(config, step, elapsed) == pytest.approx((600 - elapsed) / (3500 * elapsed / step))
    assert lr_factor(config, 0, 0.0) == 1.0
    assert lr_factor(config, 5000, 601.0) == 0.0


def test_379_takes_the_logged_snapshots():
    """Twelve, after steps 6150 to 6700."""
    config, before, taken = schedule_of("gptq-lite-379"), None, []
    for step in range(6733):
        before = plan(config, step, step * 600.02 / 6733, before)
        if before.snapshot:
            taken.append(step + 1)
    assert taken == list(range(6150, 6701, 50))


# --- share of the run: PR #1934 ---


def test_caseops_run_has_the_published_landmarks():
    """Steps of 95.8 ms, 140.0 ms with the loop on: warm-down from step 1,564, loop from 2,190, floor from 4,652, 4,974 steps."""
    config = schedule_of("caseops-1934")
    elapsed, before, landmarks = 0.0, None, {}
    step = 0
    while elapsed < 599.5:
        before = plan(config, step, elapsed, before)
        if before.lr_factor < 1:
            landmarks.setdefault("warmdown", step)
        if before.looped:
            landmarks.setdefault("loop", step)
        if before.lr_factor == 0.1:
            landmarks.setdefault("floor", step)
        elapsed += 0.1400 if before.looped else 0.0958
        step += 1
    assert landmarks["warmdown"] == pytest.approx(1564, abs=3)
    assert landmarks["loop"] == pytest.approx(2190, abs=3)
    assert landmarks["floor"] == pytest.approx(4652, abs=3)
    assert step == pytest.approx(4974, abs=3)


def test_caseops_factor():
    config = schedule_of("caseops-1934")
    for f, factor in ((0.0, 1.0), (0.2499, 1.0), (0.625, 0.5), (0.925, 0.1), (0.99, 0.1), (1.01, 0.1)):
        assert lr_factor(config, 100, f * 599.5) == pytest.approx(factor, abs=1e-12)
    by_steps = dataclasses.replace(config, max_wallclock_seconds=0.0, iterations=1000)
    assert progress(by_steps, 350, 1e9) == 0.35
    assert lr_factor(by_steps, 625, 1e9) == pytest.approx(0.5)


# --- the rest ---


def test_muon_momentum():
    config = schedule_of("base")
    assert [muon_momentum(config, s) for s in (0, 750, 1500, 9000)] == pytest.approx([0.92, 0.955, 0.99, 0.99])
    assert muon_momentum(schedule_of("caseops-1934"), 1500) == pytest.approx(0.97)
    assert muon_momentum(dataclasses.replace(config, muon_momentum_warmup_steps=0), 0) == pytest.approx(0.99)


def test_switches_stay_on():
    """A run of slow steps followed by fast ones moves the clock schedule back above the threshold."""
    config = schedule_of("legal-ttt-691", late_qat=True)
    on = plan(config, 3000, 560.0)
    assert on.fake_quant and lr_factor(config, 5000, 500.0) > config.qat_below_lr
    assert plan(config, 5000, 500.0, on).fake_quant and not plan(config, 5000, 500.0).fake_quant
    caseops = schedule_of("caseops-1934")
    assert plan(caseops, 2200, 209.0, plan(caseops, 2199, 210.0)).looped and not plan(caseops, 2200, 209.0).looped


def test_late_qat_is_off_as_in_the_published_runs():
    for name in ("gptq-lite-379", "gepa-598", "legal-ttt-691"):
        assert not plan(schedule_of(name), 6990, 599.9).fake_quant


def test_no_warmdown():
    config = ScheduleConfig(warmdown_iters=0, max_wallclock_seconds=10.0)
    assert lr_factor(config, 5, 9.9) == lr_factor(config, 5, 10.5) == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(iterations=0), "schedule.iterations"),
        (dict(warmdown_frac=0.5), "set this or schedule.warmdown_iters"),
        (dict(warmdown_frac=1.5, warmdown_iters=0), "expected 0 to 1"),
        (dict(reserve_seconds=600.0), "leaves no time"),
        (dict(swa_every=0), "schedule.swa_every"),
    ],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**changes)
