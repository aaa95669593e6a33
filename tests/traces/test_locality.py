"""The locality report: worked out by hand, and by its laws."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.routings import rng, same, single, trace_of, traces
from traces import NOT_ROUTED, Phase, Trace, segments
from traces.locality import (
    AT_WORK,
    batch_unions,
    capacities,
    locality,
    popularity_entropy,
    popularity_overlap,
    uniform_union,
    verdict,
    working_set,
)
from traces.segments import segment_hits, segment_routing, stride_of
from traces.synthetic import Sizes, markov, zipf


def test_entropy_is_of_the_shares_of_all_choices() -> None:
    trace = trace_of([[[0], [2]], [[1], [2]], [[2], [2]], [[3], [2]]])
    same(popularity_entropy(trace), [1.0, 0.0])
    same(popularity_entropy(single(0, 0, 1, 1)), [0.5])
    assert np.isnan(popularity_entropy(single(NOT_ROUTED, NOT_ROUTED))).all()
    assert np.isnan(popularity_entropy(single(0, 0, number=1))).all()


def test_srp_golden() -> None:
    """Tokens 0 0 1 0, m = 2: windows {0:2} {0:1, 1:1} {1:1, 0:1}, Act 6.

    t = 2: Match 2, Pred 2 * 1, SRP 4 / 8. t = 1: Match 6, Pred 2 * 5, SRP 12 / 16: the best, of size 10 / 6.
    """
    (found,) = segment_routing(single(0, 0, 1, 0), rng(), [2])
    assert (found.windows, found.sequences, found.interval) == (3, 1, None)
    for best in (found.model, found.layers):
        same([best.srp, best.threshold, best.cache_size], [[0.75], [1], [10 / 6]])


def test_srp_takes_the_smallest_set_of_equals() -> None:
    """Tokens 0 0 0 1, m = 4: one window {0:3, 1:1}, Act 4. t = 2 and t = 3: Match 3, Pred 4, 6 / 8. t = 1: 8 / 12."""
    (found,) = segment_routing(single(0, 0, 0, 1), rng(), [4])
    same([found.model.srp, found.model.threshold, found.model.cache_size], [[0.75], [3], [1]])


def test_srp_of_the_model_has_one_threshold_for_all_layers() -> None:
    """Layer 0 as in the golden case before (t = 3), layer 1 is 0 1 2 3 (t = 1: Match 4, Pred 16, SRP 8 / 20).

    Together Act 8. t = 1: Match 8, Pred 8 + 16, SRP 16 / 32. t = 3: Match 3, Pred 4, SRP 6 / 12: as good, and smaller.
    """
    trace = trace_of([[[0], [0]], [[0], [1]], [[0], [2]], [[1], [3]]])
    (found,) = segment_routing(trace, rng(), [4])
    same(found.layers.srp, [0.75, 0.4])
    same(found.layers.threshold, [3, 1])
    same([found.model.srp, found.model.threshold, found.model.cache_size], [[0.5], [3], [0.5]])


def test_srp_windows_stay_within_a_sequence() -> None:
    trace = single(0, 1, 0, 1, sequence=[0, 1, 0, 1])
    (found,) = segment_routing(trace, rng(), [2])
    assert (found.windows, found.model.srp.item()) == (2, 1.0)
    (none,) = segment_routing(trace, rng(), [4])
    assert (none.windows, none.interval) == (0, None)
    assert np.isnan(none.model).all()


def test_the_interval_is_of_resampled_sequences() -> None:
    """Sequences 0 0 (SRP 1) and 0 1: t = 1 gives Match 2, Pred 4, SRP 4 / 6; in half of all draws they are mixed."""
    trace = single(0, 0, 0, 1, sequence=[0, 0, 1, 1])
    (found,) = segment_routing(trace, rng(), [2])
    assert found.interval == pytest.approx((2 / 3, 1.0))
    (again,) = segment_routing(trace, rng(), [2])
    assert again.interval == found.interval


def test_sch_golden() -> None:
    """Tokens 0 1 2 1 0, m = 2, one slot.

    Before 0: {0, 1} once each, none used before, 0 is the token's own: held, a hit. Before 1: {1, 2}, likewise a hit.
    Before 2: {2, 1}, 1 was used before and is held: a miss. Before 1: {1, 0}, 1 is more recent: a hit. Before the
    last, the window has 0 alone: a hit. With two slots all of a window is held.
    """
    (curve,) = segment_hits(single(0, 1, 2, 1, 0), [2])
    same(curve, [[0, 4 / 5, 1, 1, 1]])


def test_sch_prefers_the_more_used_to_the_more_recent() -> None:
    """Tokens 0 1 2 2, m = 3, one slot: before 1 the window has 2 twice, so 1 is not held."""
    (curve,) = segment_hits(single(0, 1, 2, 2), [3])
    same(curve[0, :2], [0, 3 / 4])


def test_sch_forgets_other_sequences() -> None:
    """In the second sequence, 0 1, expert 1 was never used before: 0 is the token's own, and is held."""
    (curve,) = segment_hits(single(1, 0, 1, sequence=[0, 1, 1]), [2])
    same(curve[0, 1], 1.0)


def test_overlap_of_any_two_tokens() -> None:
    """Tokens 0 0 1: of the six ordered pairs two share their expert."""
    same(popularity_overlap(single(0, 0, 1)), [2 / 6])
    assert np.isnan(popularity_overlap(single(0))).all()


def test_working_set_golden() -> None:
    sizes, windows = working_set(single(0, 0, 1, 2, 3, sequence=[0, 0, 0, 0, 1]))
    same(sizes[:3, 0], [1, (1 + 2 + 2) / 3, 3])
    assert windows[:4] == [5, 3, 1, 0]
    assert np.isnan(sizes[3:]).all()


def test_batch_union_golden() -> None:
    """Three sequences in two lanes: the first two share a prefill event (0 1) and one decode event (2 2)."""
    prefill, decode = Phase.PREFILL, Phase.DECODE
    trace = trace_of(
        [[[0]], [[1]], [[2]], [[2]], [[3]], [[0]]],
        [5, 7, 5, 7, 7, 9],
        [prefill, prefill, decode, decode, decode, prefill],
    )
    sizes, events = batch_unions(trace, [1, 2, 4])
    same(sizes[:, 0], [1, (2 + 1) / 2, math.nan])
    assert events == [6, 2, 0]


def test_uniform_union_counts_distinct_draws() -> None:
    trace = single(0, number=2)
    assert [uniform_union(trace, tokens) for tokens in (0, 1, 2, 3)] == [0, 1, 1.5, 1.75]


# Laws.


@given(trace=traces())
@settings(max_examples=25)
def test_sch_grows_with_the_capacity_to_all(trace: Trace) -> None:
    curves = segment_hits(trace)
    curves = curves[~np.isnan(curves).any(axis=-1)]
    assert (np.diff(curves, axis=-1) >= 0).all()
    assert (curves[:, 0] == 0).all()
    assert (curves[:, -1] == 1).all()


def rounded(record: Any) -> Any:
    """The numbers of a report without the noise of another order of summing."""
    if isinstance(record, dict):
        return {key: rounded(value) for key, value in record.items()}
    if isinstance(record, list):
        return [rounded(value) for value in record]
    return round(record, 9) if isinstance(record, float) else record


@given(trace=traces(), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_names_of_experts_do_not_matter(trace: Trace, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(trace.header.experts)
    renamed = np.where(trace.expert_ids == NOT_ROUTED, NOT_ROUTED, order[trace.expert_ids % trace.header.experts])
    other = trace_of(renamed, trace.sequence.tolist(), trace.phase, trace.header.experts)
    assert rounded(locality(other, rng=rng(), resamples=5)) == rounded(locality(trace, rng=rng(), resamples=5))


def test_constant_routing_is_perfectly_local() -> None:
    record = locality(trace_of([[[1, 3]]] * 300, [0] * 150 + [1] * 150), rng=rng())
    assert [entry["mean"] for entry in record["overlap"]["lags"]] == [1.0] * 64
    assert [entry["srp"] for entry in record["srp"]] == [1.0, 1.0, 1.0, None]
    assert [entry["cache_size"] for entry in record["srp"]] == [1.0, 1.0, 1.0, None]
    assert [entry["threshold"] for entry in record["srp"]] == [4, 16, 64, None]
    assert {entry["capacity_slots"]: entry["mean"] for entry in record["sch"]} == {1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0}
    assert {entry["mean"] for entry in record["working_set"]} == {2.0, None}
    assert record["verdict"]["at_work"] == "popularity"


UNIFORM = Sizes(sequences=4, prompt_tokens=0, new_tokens=1500, layers=2, experts=32, top_k=4, skew=0.0)


def test_uniform_routing_has_nothing_to_keep() -> None:
    record = locality(zipf(rng(), UNIFORM), rng=rng())
    means = [entry["mean"] for entry in record["overlap"]["lags"]]
    assert means == pytest.approx([4 / 32] * 64, abs=0.01)
    assert record["overlap"]["popularity"]["mean"] == pytest.approx(4 / 32, abs=0.002)
    assert record["popularity_entropy"]["mean"] == pytest.approx(1, abs=0.002)
    for entry in [*record["working_set"], *record["batch_union"][:3]]:
        assert entry["mean"] == pytest.approx(entry["uniform"], abs=0.2)
    assert record["verdict"]["at_work"] == "neither"
    assert record["verdict"]["sentence"].startswith("neither: neighbouring tokens share 0.1")
    assert "64 tokens use 32 of 32 experts" in record["verdict"]["sentence"]


def test_a_sticky_router_is_order() -> None:
    record = locality(markov(rng(), UNIFORM, locality=0.4), rng=rng())
    assert record["verdict"]["at_work"] == "order"
    assert record["verdict"]["order_gain"] == pytest.approx(0.4 * (1 - 4 / 32), abs=0.03)
    assert "keep what was just used (lru, lfru): with 8 of 32 slots a layer" in record["verdict"]["sentence"]


def test_a_skewed_router_is_popularity() -> None:
    skewed = Sizes(sequences=4, prompt_tokens=0, new_tokens=400, layers=2, experts=32, top_k=4, skew=1.2)
    record = locality(zipf(rng(), skewed), rng=rng())
    assert record["verdict"]["at_work"] == "popularity"
    assert abs(record["verdict"]["order_gain"]) < 0.02
    assert "keep what is used most (lfu, static)" in record["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("anywhere", "neighbours", "at_work"),
    [
        (0.25 + 1.01 * AT_WORK, 0.25 + 1.01 * AT_WORK, "popularity"),
        (0.25 + 2 * AT_WORK, 0.25 + 4 * AT_WORK, "order"),
        (0.25 + 2 * AT_WORK, 0.25 + 3 * AT_WORK, "popularity"),
        (0.25 + AT_WORK / 2, 0.25 + AT_WORK, "neither"),
        (0.25, None, "neither"),
        (None, None, "neither"),
    ],
)
def test_the_verdict_is_the_larger_gain_above_the_threshold(anywhere: Any, neighbours: Any, at_work: str) -> None:
    record = {
        "experts": 8,
        "top_k": 2,
        "overlap": {"chance": 0.25, "popularity": {"mean": anywhere}, "lags": [{"mean": neighbours}]},
        "sch": [{"window": 16, "capacity_slots": 4, "mean": 0.7}],
        "working_set": [{"window": 1, "mean": 2.0}, {"window": 2, "mean": None}],
    }
    assert verdict(record)["at_work"] == at_work


def test_the_report_is_json_of_stated_shape() -> None:
    trace = markov(rng(), Sizes(sequences=3, prompt_tokens=5, new_tokens=15, layers=2, experts=6, top_k=2))
    told: list[tuple[int, int]] = []
    record = locality(trace, rng=rng(), progress=lambda done, total: told.append((done, total)))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert told == [(done, 10) for done in range(1, 11)]
    assert (record["tokens"], record["sequences"], record["window_stride"]) == (60, 3, 1)
    assert [entry["window"] for entry in record["srp"]] == [4, 16, 64, 256]
    assert record["srp"][0]["low"] <= record["srp"][0]["srp"] <= record["srp"][0]["high"]
    assert [entry["capacity_slots"] for entry in record["sch"]] == [1, 2, 3, 4, 6] * 4
    assert [entry["batch"] for entry in record["batch_union"]] == [1, 2, 4, 8, 16, 32, 64]
    assert [entry["observed"] for entry in record["batch_union"]] == [60, 20, 0, 0, 0, 0, 0]
    assert [entry["observed"] for entry in record["working_set"]][:6] == [60, 57, 51, 39, 15, 0]


@pytest.mark.parametrize(
    ("experts", "top_k", "slots"),
    [
        (32, 4, [4, 8, 16, 24]),
        (8, 1, [1, 2, 4, 6]),
        (2, 2, [1, 2]),
        (60, 4, [4, 7, 8, 15, 16, 30, 45]),
        (4, 3, [1, 2, 3, 4]),
    ],
)
def test_capacities_fit_the_layer(experts: int, top_k: int, slots: list[int]) -> None:
    assert capacities(trace_of([[list(range(top_k))]], experts=experts)) == slots


def test_one_token_has_a_report() -> None:
    record = locality(single(0), rng=rng())
    assert record["overlap"]["lags"][0]["mean"] is None
    assert record["srp"][0]["srp"] is None
    assert record["working_set"][0]["mean"] == 1.0
    assert record["verdict"]["at_work"] == "neither"


def test_a_stride_takes_every_other_window() -> None:
    """Tokens 0 0 1 1 2, m = 2, every other window: {0:2} {1:2}; and SCH(1, 0 or 1) at tokens 0, 2 and 4."""
    trace = single(0, 0, 1, 1, 2)
    (found,) = segment_routing(trace, rng(), [2], stride=2)
    assert (found.windows, found.model.srp.item()) == (2, 1.0)
    (curve,) = segment_hits(single(0, 1, 2, 1, 0), [2], stride=2)
    same(curve[0, :3], [0, 2 / 3, 1])


def test_the_stride_bounds_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = single(*[0] * 10)
    assert stride_of(trace) == 1
    monkeypatch.setattr(segments, "CHUNK_ELEMENTS", 15)
    assert stride_of(trace) == 3
