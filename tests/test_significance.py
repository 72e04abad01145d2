"""Welch's test against closed forms and published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_fast import significance
from pgolf_fast.significance import Sample, Welch, more_seeds, power, student_quantile, student_tail

# Bits per byte by seed: PR #549's logs, PR #1019's, PR #1855's.
PR_549 = [1.11922998, 1.12002032, 1.11888882]
PR_1019 = [1.11508120, 1.11437394, 1.11475014]
PR_1855 = [1.05989, 1.06125, 1.06209]


def tail_df1(t):
    return math.atan2(1, t) / math.pi


def tail_df2(t):
    return 1 / (math.sqrt(2 + t * t) * (math.sqrt(2 + t * t) + t)) if t > 0 else 0.5 - t / (2 * math.sqrt(2 + t * t))


def tail_df4(t):
    return 0.5 - (t / math.sqrt(4 + t * t)) * (1 + 2 / (4 + t * t)) / 2


@pytest.mark.parametrize(("df", "closed"), [(1, tail_df1), (2, tail_df2)])
@given(t=st.floats(-60, 60))
def test_the_tail_agrees_with_its_closed_forms(df, closed, t):
    assert student_tail(t, df) == pytest.approx(closed(t), rel=1e-10)


@given(t=st.floats(-8, 8))
def test_the_tail_for_four_degrees(t):
    assert student_tail(t, 4) == pytest.approx(tail_df4(t), abs=1e-13)


@pytest.mark.parametrize("df", [1.3, 3.3063, 7.7, 55.5])
@pytest.mark.parametrize("t", [-2.5, 0.0, 0.3, 1.7, 6.0])
def test_the_tail_for_fractional_degrees_is_the_integral_of_the_density(df, t):
    """By the midpoint rule in the angle: t = sqrt(df) tan(angle) makes the density a power of the cosine."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, 2_000_001)
    middles, width = (angles[1:] + angles[:-1]) / 2, angles[1] - angles[0]
    density = np.cos(middles) ** (df - 1)
    share = density[middles > math.atan(t / math.sqrt(df))].sum() / density.sum()
    assert student_tail(t, df) == pytest.approx(share, abs=2 * width)


def test_a_table_of_critical_values():
    for df, value in ((1, 31.821), (2, 6.965), (3, 4.541), (4, 3.747), (10, 2.764), (30, 2.457)):
        assert student_quantile(0.01, df) == pytest.approx(value, abs=5e-4)
    for p, df, value in ((0.25, 1, 1.0), (0.25, 3, 0.765), (0.25, 10, 0.700), (0.4, 5, 0.267)):
        assert student_quantile(p, df) == pytest.approx(value, abs=5e-4)


def test_many_at_once_are_each_alone():
    t, df = np.array([-1.0, 0.0, 2.0]), np.array([3.0, 4.0, 2.5])
    assert student_tail(t, df).tolist() == [float(student_tail(a, b)) for a, b in zip(t, df)]


def test_the_published_test_of_pr_1019():
    test = Welch.of(Sample.of(PR_549), Sample.of(PR_1019))
    assert test.t == pytest.approx(-11.83, abs=5e-3)
    assert test.df == pytest.approx(3.31, abs=5e-3)
    assert test.gain == pytest.approx(0.00464458, abs=1e-7)


def test_the_deviation_is_that_of_a_sample():
    """PR #1855 printed 0.00090, that of a population."""
    assert Sample.of(PR_1855).sd == pytest.approx(0.00111, abs=5e-6)


def test_the_interval_is_where_the_test_turns():
    test = Welch.of(Sample.of(PR_549), Sample.of(PR_1019))
    low, high = test.interval(0.95)
    assert test.p(low) == pytest.approx(0.025) and test.p(high) == pytest.approx(0.975)


@pytest.mark.parametrize(("seeds", "gain", "share"), [(3, 0.010, 0.48), (3, 0.012, 0.77), (5, 0.010, 0.97), (5, 0.012, 1.00)])
def test_the_power_that_the_design_measured(seeds, gain, share):
    """Another program's figures for 0.005 nats at p < 0.01 and a deviation of 0.0015 nats per token by seed."""
    old, new = Sample(2 + gain, 0.0015, seeds), Sample(2, 0.0015, seeds)
    assert power(old, new, 0.005, 0.01) == pytest.approx(share, abs=0.015)


def test_the_chain_rule_lets_a_quarter_of_nothing_pass():
    assert power(Sample(2, 0.0015, 3), Sample(2, 0.0015, 3), 0.0, 0.25) == pytest.approx(0.24, abs=0.015)


def test_more_seeds_reach_the_power_and_fewer_do_not(monkeypatch):
    old, new = Sample(2.010, 0.0015, 3), Sample(2, 0.0015, 3)
    more = more_seeds(old, new, 0.005, 0.01)
    chances = [power(Sample(2.010, 0.0015, 3 + k), Sample(2, 0.0015, 3 + k), 0.005, 0.01) for k in (more - 1, more)]
    assert chances[0] < 0.8 <= chances[1]
    for most, found in ((more, more), (more - 1, None)):
        monkeypatch.setattr(significance, "MAX_SEEDS", most)
        assert more_seeds(old, new, 0.005, 0.01) == found
    monkeypatch.undo()
    assert more_seeds(old, new, 0.010, 0.01) is None, "a gain that is not above the margin"
    assert more_seeds(Sample(2.0051, 0.0015, 3), new, 0.005, 0.01) is None, "a gain hardly above it"
