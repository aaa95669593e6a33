"""Crossings, stretches and fronts: by hand, and as laws."""

from __future__ import annotations

from itertools import pairwise
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.crossovers import Crossing, Lead, crossings, leads, pareto

X = [4.0, 8.0, 16.0, 32.0]
FLAT = [10.0, 10.0, 10.0, 10.0]


def test_a_crossing_is_interpolated_on_the_logarithm() -> None:
    """From 8 to 16 the difference goes from -2 to 2: the logarithm is halved at 8 sqrt 2, the number at 12."""
    curves = {"cpu": FLAT, "link": [4.0, 8.0, 12.0, 16.0]}
    (log,) = crossings(X, curves, log=True, lower=False)
    assert log == Crossing(pytest.approx(8 * 2**0.5), 8.0, 16.0, "cpu", "link")
    (linear,) = crossings(X, curves, log=False, lower=False)
    assert linear == Crossing(pytest.approx(12.0), 8.0, 16.0, "cpu", "link")
    (times,) = crossings(X, curves, log=False, lower=True)
    assert (times.below, times.above) == ("link", "cpu")


def test_a_crossing_at_a_point_and_after_a_stretch_of_equals() -> None:
    at_point = crossings(X, {"a": FLAT, "b": [9.0, 10.0, 11.0, 12.0]}, log=True, lower=False)
    assert at_point == [Crossing(pytest.approx(8.0), 4.0, 16.0, "a", "b")]
    stretch = crossings(X, {"a": FLAT, "b": [9.0, 10.0, 10.0, 12.0]}, log=True, lower=False)
    assert stretch == [Crossing(pytest.approx(8.0), 4.0, 32.0, "a", "b")]


@pytest.mark.parametrize(
    "other", [FLAT, [11.0, 10.0, 10.0, 11.0], [10.0, 10.0, 10.0, 9.0], [10 + 1e-12] * 4, [nan] * 4]
)
def test_what_touches_does_not_cross(other: list[float]) -> None:
    assert crossings(X, {"a": FLAT, "b": other}, log=True, lower=False) == []


def test_points_that_did_not_run_are_passed_over() -> None:
    (found,) = crossings(X, {"a": FLAT, "b": [8.0, nan, 12.0, nan]}, log=False, lower=False)
    assert found == Crossing(pytest.approx(10.0), 4.0, 16.0, "a", "b")


def test_stretches_name_all_that_are_best() -> None:
    curves = {"a": FLAT, "same": FLAT, "b": [4.0, 8.0, 12.0, 16.0]}
    found = leads(X, curves, log=False, lower=False)
    assert found == [Lead(("a", "same"), 4.0, pytest.approx(12.0)), Lead(("b",), pytest.approx(12.0), 32.0)]
    assert leads(X, {"a": FLAT, "b": [5.0] * 4}, log=True, lower=True) == [Lead(("b",), 4.0, 32.0)]


def test_a_curve_takes_part_where_it_is_known() -> None:
    found = leads(X, {"a": [1.0, 1.0, nan, nan], "b": [0.0] * 4, "never": [nan] * 4}, log=True, lower=False)
    assert found == [Lead(("a",), 4.0, 8.0), Lead(("b",), 8.0, 32.0)]
    assert leads(X, {"a": [nan] * 4}, log=True, lower=False) == []


heights = st.lists(st.integers(0, 9).map(float), min_size=4, max_size=4)


@given(st.lists(heights, min_size=2, max_size=4), st.booleans(), st.booleans())
def test_laws_of_lines(curves: list[list[float]], log: bool, lower: bool) -> None:
    """Stretches cover the axis without a gap, neighbours differ; at every point the leader has the best value."""
    named = {str(number): curve for number, curve in enumerate(curves)}
    found = leads(X, named, log=log, lower=lower)
    assert (found[0].start, found[-1].end) == (X[0], X[-1])
    for left, right in pairwise(found):
        assert left.end == right.start
        assert left.names != right.names
    best = min if lower else max
    for place, at in enumerate(X):
        for one in found:
            if one.start < at < one.end:
                assert all(named[name][place] == best(curve[place] for curve in curves) for name in one.names)
    for one in crossings(X, named, log=log, lower=lower):
        assert one.low < one.x < one.high


def test_a_front_is_what_nothing_beats() -> None:
    costs, values = [3.0, 1.0, 2.0, 2.0, 4.0, nan], [5.0, 1.0, 5.0, 2.0, 9.0, 99.0]
    assert pareto(costs, values, lower=False) == [1, 2, 4]
    assert pareto(costs, [-value for value in values], lower=True) == [1, 2, 4]
    assert pareto([1.0, 1.0], [2.0, 2.0], lower=False) == [0]
    assert pareto([], [], lower=False) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_laws_of_fronts(points: list[tuple[int, int]]) -> None:
    costs, values = [float(one) for one, _ in points], [float(one) for _, one in points]
    front = pareto(costs, values, lower=False)
    last = (-inf, -inf)
    for place in front:
        assert last < (costs[place], values[place])
        last = (costs[place], values[place])
    for place, (cost, value) in enumerate(points):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        same = points.index((cost, value)) != place
        assert (place in front) == (not beaten and not same)
