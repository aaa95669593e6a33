from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from analysis import metrics
from analysis.frames import requests_frame, step_frame
from sim.results import COLUMNS, RunResult
from traces.errors import InputError

SECONDS = st.floats(1e-6, 1e3, allow_nan=False)
POINTS = st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=30)
LAYERS = pd.DataFrame(
    {"union": [4, 2], "hits_union": [1, 2], "late_hits": [1, 0], "assignments": [10, 6], "hits_assignments": [7, 6]}
)


def test_hit_ratios() -> None:
    assert metrics.hit_ratio_union(LAYERS) == pytest.approx(3 / 6)
    assert metrics.hit_ratio_assignments(LAYERS) == pytest.approx(13 / 16)
    assert metrics.late_hit_ratio(LAYERS) == pytest.approx(1 / 6)


def test_nothing_observed_is_not_a_number() -> None:
    assert math.isnan(metrics.hit_ratio_union(LAYERS.iloc[:0]))
    assert math.isnan(metrics.percentile([], 50))
    assert math.isnan(metrics.ratio(1.0, 0.0))


def test_percentile_interpolates() -> None:
    assert metrics.percentile([12.0, 8.0, 10.0], 50) == 10.0
    assert metrics.percentile([12.0, 8.0, 10.0], 90) == pytest.approx(11.6)
    assert metrics.percentile([12.0, 8.0, 10.0], 99) == pytest.approx(11.96)


def test_summary_of_a_run(measured: RunResult) -> None:
    summary = metrics.summarise_run(step_frame(measured), requests_frame(measured), measured.events)
    assert summary.tokens == 3
    assert summary.tokens_per_s == pytest.approx(3 / 0.030)
    assert summary.tpot_p50_s == pytest.approx(0.010)
    assert summary.tpot_p90_s == pytest.approx(0.0116)
    assert summary.tpot_p99_s == pytest.approx(0.01196)
    assert summary.ttft_s == pytest.approx(0.020)
    assert summary.hit_ratio_union == pytest.approx(8 / 12)
    assert summary.hit_ratio_assignments == pytest.approx(8 / 12)
    assert summary.late_hit_ratio == pytest.approx(1 / 12)
    assert summary.bytes_per_token == pytest.approx(200 / 3)
    assert summary.stall_share == pytest.approx(5.5 / 30)
    assert summary.busy["gpu"] == pytest.approx((4 + 8 + 3 * 6) / 50)
    assert summary.busy["host"] == pytest.approx(4 / 50)
    assert summary.busy["link"] == pytest.approx(5.25 / 50)


def test_lanes_weigh_the_time_per_token(measured: RunResult) -> None:
    steps = step_frame(measured).assign(lanes=[1, 1, 4, 1])
    summary = metrics.summarise_run(steps, requests_frame(measured), measured.events)
    assert summary.tpot_p50_s == pytest.approx(0.012)


SAME_FIGURES = {
    "decode_tokens": "tokens",
    "tokens_per_s": "tokens_per_s",
    "time_per_output_token_p50_s": "tpot_p50_s",
    "time_per_output_token_p99_s": "tpot_p99_s",
    "time_to_first_token_p50_s": "ttft_s",
    "hit_ratio_union": "hit_ratio_union",
    "hit_ratio_assignments": "hit_ratio_assignments",
    "demand_bytes_per_token": "bytes_per_token",
    "stall_share": "stall_share",
}
"""Figures that a run's headline and its summary both have, by their names there."""


def test_headline_of_a_batch_is_the_summary(measured: RunResult) -> None:
    # step 2 has four lanes, step 3 two: dropping or repeating a step would move every quantile and rate
    extra = [measured.tokens[measured.tokens["step"] == 2].assign(sequence=lane) for lane in (1, 2, 3)]
    extra.append(measured.tokens[measured.tokens["step"] == 3].assign(sequence=1))
    measured.tokens = pd.concat([measured.tokens, *extra], ignore_index=True)
    measured.layers.loc[4, ["hits_assignments", "assignments"]] = [3, 8]
    measured.requests = pd.concat([measured.requests, measured.requests.assign(first_token_s=0.03)], ignore_index=True)
    summary = metrics.summarise_run(step_frame(measured), requests_frame(measured), measured.events)
    headline = measured.headline()
    for name, field in SAME_FIGURES.items():
        assert headline[name] == pytest.approx(getattr(summary, field)), name
    assert headline["decode_tokens"] == 7
    assert headline["time_per_output_token_p50_s"] == pytest.approx(0.012)
    assert headline["tokens_per_s"] == pytest.approx(7 / 0.030)
    assert headline["stall_share"] == pytest.approx(5.5 / 30)
    assert headline["hit_ratio_union"] != headline["hit_ratio_assignments"]
    assert headline["late_hits"] == pytest.approx(summary.late_hit_ratio * 12)


def test_headline_without_decoding_has_no_figures(measured: RunResult) -> None:
    measured.tokens, measured.layers = measured.tokens.iloc[:1], measured.layers.iloc[:2]
    headline = measured.headline()
    assert headline["decode_tokens"] == 0
    ratios = [name for name in SAME_FIGURES if name not in ("decode_tokens", "time_to_first_token_p50_s")]
    assert [headline[name] for name in ratios] == [None] * len(ratios)


def test_overlapping_work_is_counted_once() -> None:
    assert metrics.covered_s([0.0, 1.0, 5.0], [3.0, 2.0, 6.0]) == pytest.approx(4.0)
    assert metrics.covered_s([5.0, 0.0, 2.5], [6.0, 3.0, 4.0]) == pytest.approx(5.0)
    assert metrics.covered_s([], []) == 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=20))
def test_covered_time_is_what_a_ruler_says(pieces: list[tuple[int, int]]) -> None:
    ruler = {tick for start, length in pieces for tick in range(start, start + length)}
    starts, ends = [start for start, _ in pieces], [start + length for start, length in pieces]
    assert metrics.covered_s(starts, ends) == pytest.approx(len(ruler))


def test_errors() -> None:
    summary = metrics.summarise_errors([10.0, 12.0, 8.0], [11.0, 12.0, 6.0])
    assert summary.tokens == 3
    assert summary.median == pytest.approx(0.1)
    assert summary.mape == pytest.approx(0.35 / 3)
    assert summary.p90 == pytest.approx(0.22)
    assert summary.p99 == pytest.approx(0.247)
    assert summary.worst == pytest.approx(0.25)
    assert summary.bias == pytest.approx(-0.05)


def test_no_tokens_have_no_error() -> None:
    summary = metrics.summarise_errors([], [])
    assert summary.tokens == 0
    assert math.isnan(summary.median)
    assert math.isnan(summary.bias)


@pytest.mark.parametrize("measured", [[0.0, 1.0], [-1.0, 1.0], [math.nan, 1.0]])
def test_measured_times_must_be_positive(measured: list[float]) -> None:
    with pytest.raises(InputError, match="measured latency must be above 0 s"):
        metrics.absolute_errors(measured, [1.0, 1.0])


def test_errors_need_pairs() -> None:
    with pytest.raises(InputError, match=r"simulated must have as many tokens as measured \(2\), got 1"):
        metrics.signed_errors([1.0, 2.0], [1.0])


@given(st.lists(SECONDS, min_size=1, max_size=20), st.floats(0.01, 100.0))
def test_errors_have_no_unit(measured: list[float], unit: float) -> None:
    simulated = [1.3 * value for value in measured]
    scaled = metrics.absolute_errors(np.multiply(measured, unit), np.multiply(simulated, unit))
    assert scaled == pytest.approx(metrics.absolute_errors(measured, simulated))
    assert scaled == pytest.approx(np.full(len(measured), 0.3))


def test_skill() -> None:
    assert metrics.skill([10.0, 12.0, 8.0], [11.0, 12.0, 6.0], 10.0) == pytest.approx(0.1 / (1 / 6))


def test_skill_against_each_systems_own_mean() -> None:
    # the constants miss by 2/10, 2/12 and 4/8
    assert metrics.skill([10.0, 12.0, 8.0], [11.0, 12.0, 6.0], [12.0, 10.0, 12.0]) == pytest.approx(0.1 / 0.2)
    assert metrics.skill([10.0, 12.0, 8.0], [11.0, 12.0, 6.0], [10.0] * 3) == pytest.approx(0.6)


@pytest.mark.parametrize("means", [[10.0], [10.0, 10.0], [[10.0] * 3]])
def test_skill_needs_one_mean_or_one_a_token(means: list[float]) -> None:
    with pytest.raises(InputError, match=r"calibration_mean_s must be one number or one a token \(3\), got "):
        metrics.skill([10.0, 12.0, 8.0], [11.0, 12.0, 6.0], means)


def test_skill_against_a_perfect_constant_is_not_a_number() -> None:
    assert math.isnan(metrics.skill([1.0, 1.0], [1.1, 1.1], 1.0))


@given(st.lists(SECONDS, min_size=1, max_size=20), SECONDS)
def test_the_constant_itself_has_skill_one(measured: list[float], constant: float) -> None:
    value = metrics.skill(measured, [constant] * len(measured), constant)
    assert math.isnan(value) or value == pytest.approx(1.0)


@given(st.lists(SECONDS, min_size=2, max_size=20, unique=True))
def test_a_perfect_simulation_has_skill_zero(measured: list[float]) -> None:
    assert metrics.skill(measured, measured, 2e3) == 0.0


def test_noise_floor() -> None:
    repeats = [[10.0, 20.0, 5.0], [11.0, 22.0, 5.0], [13.0, 26.0, 5.5]]
    assert metrics.noise_floor(repeats) == pytest.approx(0.1)
    assert metrics.noise_floor([[1.0], [1.2]]) == pytest.approx(0.1)


@pytest.mark.parametrize("repeats", [[[1.0, 2.0]], [], [[], []]])
def test_noise_needs_two_repeats(repeats: list[list[float]]) -> None:
    assert math.isnan(metrics.noise_floor(repeats))


def test_tau_by_hand() -> None:
    agreement = metrics.kendall_tau([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    assert agreement.tau == pytest.approx(1 / 3)
    assert agreement.left_out == 0.0


def test_pairs_within_the_noise_are_left_out() -> None:
    agreement = metrics.kendall_tau([1.0, 1.01, 2.0], [1.1, 1.0, 2.0], noise=0.05)
    assert agreement.tau == 1.0
    assert agreement.left_out == pytest.approx(1 / 3)
    assert metrics.kendall_tau([1.0, 1.01, 2.0], [1.1, 1.0, 2.0]).tau == pytest.approx(1 / 3)


def test_tau_of_one_point_is_not_a_number() -> None:
    agreement = metrics.kendall_tau([1.0], [1.0])
    assert math.isnan(agreement.tau)
    assert math.isnan(agreement.left_out)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=25))
def test_without_noise_it_is_tau_b(points: list[tuple[int, int]]) -> None:
    ours, theirs = zip(*points, strict=True)
    expected = float(kendalltau(ours, theirs).statistic) if len({*ours}) > 1 and len({*theirs}) > 1 else math.nan
    assert metrics.kendall_tau(ours, theirs).tau == pytest.approx(expected, nan_ok=True)


@given(st.lists(SECONDS, min_size=2, max_size=20, unique=True), st.floats(0, 0.5))
def test_the_same_order_has_tau_one(measured: list[float], noise: float) -> None:
    ranks = np.argsort(np.argsort(measured)) + 1.0
    agreement = metrics.kendall_tau(measured, ranks, noise)
    assert agreement.tau == pytest.approx(1.0) or agreement.left_out == 1.0


@given(POINTS, st.floats(0, 0.5))
def test_reversing_one_side_turns_the_sign(points: list[tuple[float, float]], noise: float) -> None:
    ours, theirs = (np.array(side) for side in zip(*points, strict=True))
    forward, backward = (metrics.kendall_tau(ours, side, noise).tau for side in (theirs, -theirs))
    assert forward == pytest.approx(-backward, nan_ok=True)


def test_work_counts_as_far_as_it_lies_within_the_spans() -> None:
    rows = [
        ("gpu", "dense", 0, 0, -1, 0.0, 2.0),
        ("gpu", "expert", 0, 0, 1, 1.0, 3.0),
        ("gpu", "expert", 0, 0, 2, 5.0, 6.0),
        ("link", "copy", 0, 0, 1, 0.0, 10.0),
        ("cpu", "expert", 0, 0, 3, 3.0, 4.0),
    ]
    events = pd.DataFrame(rows, columns=list(COLUMNS["events"]))
    spans = np.array([[1.0, 3.0], [4.0, 8.0]])
    assert metrics.busy_within(events, spans) == {"cpu": 0.0, "gpu": (2.0 + 1.0) / 6, "link": 1.0}
    whole = metrics.busy_within(events, [[0.0, 10.0]])
    assert whole == pytest.approx(metrics.busy_shares(events, 10.0))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=8))
def test_work_within_one_span_is_what_the_union_covers(pieces: list[tuple[int, int]]) -> None:
    rows = [("gpu", "dense", 0, 0, -1, float(start), float(start + length)) for start, length in pieces]
    events = pd.DataFrame(rows, columns=list(COLUMNS["events"]))
    covered = {cell for start, length in pieces for cell in range(start, start + length) if 3 <= cell < 17}
    assert metrics.busy_within(events, [[3.0, 17.0]]).get("gpu", 0.0) == pytest.approx(len(covered) / 14)


def test_waiting_is_for_the_cpu_as_far_as_the_cpu_takes_longer() -> None:
    rows = pd.DataFrame(
        {
            "stall_s": [3.0, 3.0, 3.0, 0.0],
            "gpu_experts_s": [2.0, 2.0, 2.0, 2.0],
            "cpu_experts_s": [5.0, 3.0, 1.0, 2.0],
        }
    )
    for_cpu_s, for_copies_s = metrics.waits(rows)
    assert for_cpu_s.tolist() == [3.0, 1.0, 0.0, 0.0]
    assert for_copies_s.tolist() == [0.0, 2.0, 3.0, 0.0]
