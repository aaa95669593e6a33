"""Statistics of locality on traces small enough to work them out by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import NOT_ROUTED, InputError, Phase, Trace, TraceHeader
from traces.stats import chance_overlap, imbalance, loads, lru_hit_ratio, mean_union, neighbour_overlap, summary
from traces.synthetic import Sizes, markov


def decode_trace(ids: Any, sequence: list[int] | None = None, experts: int = 4) -> Trace:
    """A trace of decode tokens, one forward pass each; ids [T, L, K]."""
    ids = np.asarray(ids)
    tokens, layers, top_k = ids.shape
    sequence = sequence or [0] * tokens
    header = TraceHeader(model="hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=(1,) * layers)
    return Trace.of(
        header,
        expert_ids=ids,
        token_ids=[0] * tokens,
        sequence=sequence,
        position=[sequence[:row].count(own) for row, own in enumerate(sequence)],
        step=range(tokens),
        phase=[Phase.DECODE] * tokens,
    )


def test_overlap_counts_shared_experts_of_neighbours_only() -> None:
    ids = [[[0, 1]], [[1, 2]], [[2, 1]], [[0, 3]]]
    assert neighbour_overlap(decode_trace(ids)).tolist() == [(1 + 2 + 0) / 6]
    assert neighbour_overlap(decode_trace(ids, [0, 0, 1, 1])).tolist() == [(1 + 0) / 4]
    assert np.isnan(neighbour_overlap(decode_trace(ids, [0, 1, 2, 3]))).all()
    assert chance_overlap(decode_trace(ids)) == 0.5


def test_overlap_leaves_out_what_was_not_routed() -> None:
    ids = [[[0, 1]], [[1, NOT_ROUTED]], [[NOT_ROUTED, NOT_ROUTED]], [[1, 2]]]
    assert neighbour_overlap(decode_trace(ids)).tolist() == [1.0]


def test_loads_and_imbalance() -> None:
    trace = decode_trace([[[0, 1], [3, NOT_ROUTED]], [[0, 2], [3, NOT_ROUTED]]])
    assert loads(trace).tolist() == [[2, 1, 1, 0], [0, 0, 0, 2]]
    assert imbalance(trace).tolist() == [2.0, 4.0]


def test_mean_union_is_of_forward_passes() -> None:
    trace = decode_trace([[[0, 1]], [[1, NOT_ROUTED]]])
    assert mean_union(trace, Phase.DECODE).tolist() == [1.5]
    assert np.isnan(mean_union(trace, Phase.PREFILL)).all()


def test_lru_golden_of_the_literature() -> None:
    """Two slots, three equal layers, five tokens: 30 accesses and 12 hits (arXiv 2608.07911)."""
    unions = [[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]]
    assert lru_hit_ratio(decode_trace([[union] * 3 for union in unions]), 2) == 12 / 30


def test_lru_looks_up_all_experts_of_a_token_before_one_is_evicted() -> None:
    """One slot; serial replay of 0 then 1 would miss 1 at the third token, because 0 had pushed it out."""
    trace = decode_trace([[[1, NOT_ROUTED]], [[1, NOT_ROUTED]], [[0, 1]]])
    assert lru_hit_ratio(trace, 1) == 2 / 4


def test_lru_evicts_the_lowest_id_of_equally_recent_ones() -> None:
    kept, left = decode_trace([[[0, 1]], [[1, NOT_ROUTED]]]), decode_trace([[[0, 1]], [[0, NOT_ROUTED]]])
    assert lru_hit_ratio(kept, 1) == 1 / 3
    assert lru_hit_ratio(left, 1) == 0
    reversed_rank = decode_trace([[[1, 0]], [[1, NOT_ROUTED]]])
    assert lru_hit_ratio(reversed_rank, 1) == 1 / 3


def test_lru_counts_a_hit_as_a_use() -> None:
    """First in, first out would push 0 out at the fourth token, and hit once only."""
    assert lru_hit_ratio(decode_trace([[[0]], [[1]], [[0]], [[2]], [[0]]]), 2) == 2 / 5


def test_lru_runs_sequence_after_sequence_with_the_cache_carried_over() -> None:
    ids = [[[0]], [[1]], [[0]], [[1]]]
    assert lru_hit_ratio(decode_trace(ids), 1) == 0
    assert lru_hit_ratio(decode_trace(ids, [0, 1, 0, 1]), 1) == 2 / 4
    assert lru_hit_ratio(decode_trace([[[0]], [[0]]], [0, 1]), 1) == 1 / 2


@settings(max_examples=25)
@given(st.integers(0, 99), st.floats(0, 1))
def test_a_larger_lru_cache_never_hits_less(seed: int, locality: float) -> None:
    sizes = Sizes(sequences=2, prompt_tokens=5, new_tokens=20, layers=2, experts=8, top_k=3)
    trace = markov(np.random.default_rng(seed), sizes, locality=locality)
    ratios = [lru_hit_ratio(trace, capacity) for capacity in range(1, 9)]
    assert ratios == sorted(ratios)
    distinct = sum(len(np.unique(trace.expert_ids[:, layer])) for layer in range(2))
    assert ratios[-1] == pytest.approx(1 - distinct / trace.expert_ids.size)


def test_capacity_must_be_positive() -> None:
    with pytest.raises(InputError, match="capacity must be at least 1, got 0"):
        lru_hit_ratio(decode_trace([[[0]]]), 0)


def test_summary_is_json_without_nan() -> None:
    record = summary(decode_trace([[[0, 1]], [[1, 2]]]))
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text)["tokens"] == {"total": 2, "prefill": 0, "decode": 2}
    assert record["layers"]["mean_union_prefill"] == [None]
    assert record["layers"]["neighbour_overlap"] == [0.5]
    assert record["arrays"]["expert_ids"] == [2, 1, 2]
