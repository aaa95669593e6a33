"""The arithmetic of calibration, held against runs whose costs are known: what the engine was given comes out again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from real import fit
from sim.results import RunResult
from sim.run import simulate
from sim.spec.profile import Point
from sim.systems import Budget, SystemSpec
from tests.sim.hand import HandCosts, host
from traces.synthetic import Sizes, zipf
from traces.workload import one_at_a_time

OTHERWISE = Point(size=1, value_s=9.0, median_s=9.0, p90_s=9.0, repeats=1)


def run(place: str = "fetch", **costs: object) -> RunResult:
    sizes = Sizes(sequences=1, prompt_tokens=4, new_tokens=60, layers=4, experts=16, top_k=4, expert_bytes=100)
    workload = one_at_a_time(zipf(np.random.default_rng(5), sizes))
    given = HandCosts(**costs)  # type: ignore[arg-type]
    return simulate(workload, SystemSpec(place=place), Budget(slots=6), given, hardware="by hand")


def singles(result: RunResult, resource: str) -> pd.DataFrame:
    rows = fit.pieces(result)
    return rows[(rows.resource == resource) & ((rows.tokens == 1) | (resource == "link"))]


def test_undisturbed_seconds_are_recovered_from_runs_in_which_resources_slow_each_other_down() -> None:
    result = run(gpu=1.0, copy=3.0, slow={("gpu", "link"): 1.6, ("link", "gpu"): 1.25})
    for resource, base_s in (("gpu", 1.0), ("link", 3.0)):
        assert fit.fit(singles(result, resource), OTHERWISE).base_s == pytest.approx(base_s, rel=1e-6)


def test_what_a_lane_takes_between_two_pieces_counts_with_the_second() -> None:
    result = run(gpu=1.0, copy=3.0)
    first = result.events.kind.eq("expert").idxmax()
    layer = result.events.loc[first, ["step", "layer"]]
    later = result.events.resource.eq("gpu") & result.events.kind.eq("expert")
    later &= (result.events[["step", "layer"]] == layer).all(axis=1) & (result.events.index != first)
    for gap_s, counted_s in ((fit.MOST_GAP_S / 2, 1.0), (fit.MOST_GAP_S * 2, 1.0 - fit.MOST_GAP_S * 2)):
        shifted = RunResult(**{**vars(result), "events": result.events.copy()})
        second = shifted.events.index[later][0]
        shifted.events.loc[second, "start_s"] = shifted.events.loc[first, "end_s"] + gap_s
        shifted.events.loc[second, "end_s"] = shifted.events.loc[first, "end_s"] + 1.0
        assert fit.pieces(shifted).loc[second, "seconds"] == pytest.approx(counted_s)


def test_cpu_experts_the_first_of_a_layer_and_later_ones_are_told_apart() -> None:
    rows = singles(run("cpu-on-miss", gpu=0.5, cpu=2.0, cpu_first=1.0), "cpu")
    assert fit.fit(rows[rows["first"]], OTHERWISE).base_s == pytest.approx(3.0)
    assert fit.fit(rows[~rows["first"]], OTHERWISE).base_s == pytest.approx(2.0)


def test_host_costs_are_recovered_as_a_line_over_operations() -> None:
    given = host(controller_s=0.5, operation_s=0.25, join_s=0.125, joins_layers=True)
    found = fit.host([[run(host=given)]], joins_layers=True)
    assert found.controller_s == pytest.approx(0.5)
    assert found.operation_s == pytest.approx(0.25)
    assert found.join_s == pytest.approx(0.125)


def test_what_cpu_experts_add_to_the_host_is_told_apart() -> None:
    given = host(controller_s=0.5, operation_s=0.25, join_s=0.125, cpu_s=0.75, cpu_join_s=0.0625, joins_layers=True)
    found = fit.host([[run(host=given)], [run("cpu-on-miss", host=given)]], joins_layers=True)
    assert (found.controller_s, found.operation_s) == (pytest.approx(0.5), pytest.approx(0.25))
    assert (found.cpu_s, found.cpu_join_s) == (pytest.approx(0.75), pytest.approx(0.0625))


def test_dense_and_head_are_recovered() -> None:
    result = run(dense=0.75, head=0.5)
    (point,) = [point for point in fit.dense([[result]]) if point.tokens == 1]
    assert point.base_s + point.per_context_s * point.most_context == pytest.approx(0.75)
    (head,) = fit.head([[result]])
    assert (head.size, head.value_s) == (1, pytest.approx(0.5))


def test_a_step_is_taken_from_its_fastest_repeat() -> None:
    slow, quick = run(dense=2.0), run(dense=1.0)
    best = fit.best_rows([slow, quick], [slow.layers, quick.layers])
    assert best.dense_s.to_numpy() == pytest.approx(1.0)
    assert fit.token_s([slow, quick]) == fit.token_s([quick])
    assert len(best) == len(quick.layers)


def test_no_rows_give_the_piece_measured_alone() -> None:
    empty = singles(run(), "cpu")
    assert empty.empty
    assert fit.fit(empty, OTHERWISE).base_s == OTHERWISE.value_s


def test_sizes_are_moved_together_and_never_fall() -> None:
    points = [Point(size=size, value_s=s, median_s=s, p90_s=s, repeats=3) for size, s in ((1, 4.0), (2, 3.5), (4, 6.0))]
    base = fit.Fit(5.0, np.array([5.0]))
    assert [point.value_s for point in fit.shifted(points, base)] == [5.0, 5.0, 7.0]
