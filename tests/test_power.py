"""The power meter, on a counter that we wind ourselves."""

import time

import pytest

from benchmarks.power import PowerMeter


def counter(watts, period_s):
    """Millijoules that jump once a period, as the driver's do."""
    begin = time.perf_counter()
    return lambda: round(watts * 1e3 * period_s) * int((time.perf_counter() - begin) / period_s)


def test_mean_power_between_whole_ticks():
    with PowerMeter(counter(700.0, 0.05)) as meter:
        time.sleep(0.38)
    assert meter.watts == pytest.approx(700.0, rel=0.1)


@pytest.mark.parametrize("period_s", [10.0, 0.08])
def test_fewer_than_two_ticks_tell_nothing(period_s):
    with PowerMeter(counter(700.0, period_s)) as meter:
        time.sleep(0.1)
    assert meter.watts is None
