"""What is measured on a trace to compare it with another: worked out by hand, and on routing of a known kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from traces import NOT_ROUTED, Trace, TraceHeader
from traces.portrait import LABELS, between_places, between_sequences, cross_layer, portrait, shared_openings
from traces.synthetic import Sizes, zipf


def trace_of(sequences: Any, experts: int, domains: tuple[str, ...] = (), **arrays: Any) -> Trace:
    """A trace of sequences [tokens, L, K], each a prompt of its own length."""
    ids = np.concatenate([np.array(one) for one in sequences])
    lengths = [len(one) for one in sequences]
    tokens, layers, top_k = ids.shape
    header = TraceHeader(
        model="hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=(1,) * layers, domains=domains
    )
    lane = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    rows = {"token_ids": np.zeros(tokens), "sequence": lane, "step": lane, "position": position}
    return Trace.of(header, expert_ids=ids, phase=np.zeros(tokens), **rows, **arrays)


THREE = trace_of([[[[0, 1]], [[0, 2]]], [[[0, 1]]], [[[2, 3]]]], 4, domains=("a", "a", "b"))
"""One layer of four experts; the first tokens of the sequences of domain a agree."""


def test_sequences_share_what_their_loads_say() -> None:
    # a0 x a1: {0,1} with {0,1} 2, {0,2} with {0,1} 1: 3 of 4; a x b: 0 + 1 + 0 of 6
    found = between_sequences(THREE)
    assert found.same_domain == 3 / 4
    assert found.other_domain == 1 / 6
    assert found.anywhere == 4 / 10


def test_places_are_compared_with_the_same_place_only() -> None:
    assert between_places(THREE, 0, 1).same_domain == 1.0
    assert between_places(THREE, 0, 128).other_domain == 0.0
    assert math.isnan(between_places(THREE, 1, 128).anywhere)  # one sequence is so long


def test_without_domains_all_are_of_one() -> None:
    found = between_sequences(trace_of([[[[0]]], [[[0]]], [[[1]]]], 2))
    assert found.anywhere == found.same_domain == 1 / 3
    assert math.isnan(found.other_domain)


def test_openings_end_where_sequences_part() -> None:
    tail = [[[4]], [[5]], [[6]], [[7]]]
    one, two = [[[0]], [[1]], [[2]], *tail], [[[0]], [[1]], [[2]], *tail[::-1]]
    other = [[[0]], [[8]], [[9]], *tail[2:], *tail[:2]]
    domains = ("a", "a", "b")
    assert shared_openings(trace_of([one, two, other], 10, domains)) == (1, 3)
    assert shared_openings(trace_of([one, two], 10)) == (3, 3)
    assert shared_openings(trace_of([one], 10)) == (0, 0)


def test_a_layer_that_follows_another_is_known_from_it() -> None:
    rng = np.random.default_rng(0)
    first = rng.permuted(np.tile(np.arange(16), (4, 200, 1)), axis=-1)[..., :2]
    following = np.stack([first, (first * 5 + 3) % 16], axis=2)
    assert cross_layer(trace_of(following, 16), 1) == 1.0
    assert math.isnan(cross_layer(trace_of(following, 16), 2))
    unrelated = np.stack([first, rng.permuted(first, axis=1)], axis=2)
    unrelated[..., 1, :] = rng.permuted(np.tile(np.arange(16), (4, 200, 1)), axis=-1)[..., :2]
    assert abs(cross_layer(trace_of(unrelated, 16), 1)) < 0.05


def test_popularity_is_not_taken_for_knowledge() -> None:
    independent = zipf(np.random.default_rng(0), Sizes(sequences=8, layers=4, experts=16, top_k=2, skew=1.5))
    assert abs(cross_layer(independent, 1)) < 0.03


def test_a_portrait_tells_popularity_unions_and_gates() -> None:
    ids = [[[[0, 1]], [[0, 2]]], [[[0, 3]], [[0, 1]]]]
    gates = [[[0.75, 0.25]], [[0.5, 0.5]], [[0.625, 0.375]], [[1.0, 0.0]]]
    found = portrait(trace_of(ids, 20, gates=gates))
    assert list(found) == list(LABELS)
    assert found["busiest_tenth"] == 6 / 8  # expert 0 four times, expert 1 twice
    assert found["gini"] == pytest.approx((19 * 4 + 17 * 2 + 15 + 13) / (20 * 8))
    assert found["overlap_lag_1"] == 0.5
    assert (found["union_1"], found["union_2"], found["union_4"]) == (2.0, 3.0, None)
    assert found["largest_gate"] == (0.75 + 0.5 + 0.625 + 1.0) / 4
    assert found["cross_layer_1"] is None
    assert found["lookahead_1"] is None


def test_a_portrait_tells_the_recall_of_the_lookahead() -> None:
    ids = [[[[0, 1], [2, 3], [4, 5]]]]
    nowhere = [NOT_ROUTED, NOT_ROUTED]
    ahead = [[[[2, 3], [4, 0]], [[5, 0], nowhere], [nowhere, nowhere]]]
    found = portrait(trace_of(ids, 6, lookahead=ahead))
    assert found["lookahead_1"] == 3 / 4  # 2 and 3 of layer 1, 5 of layer 2
    assert found["lookahead_2"] == 1 / 2
    assert found["lookahead_3"] is None


def test_what_was_not_routed_counts_nowhere() -> None:
    whole = trace_of([[[[0, 1]], [[1, 2]]], [[[0, 1]], [[2, 3]]]], 4)
    holes = trace_of([[[[0, 1]], [[1, 2]], [[NOT_ROUTED] * 2]], [[[0, 1]], [[2, 3]], [[NOT_ROUTED] * 2]]], 4)
    same = ("busiest_tenth", "gini", "overlap_between", "overlap_place", "overlap_lag_1", "lru_25")
    one, other = portrait(whole), portrait(holes)
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
