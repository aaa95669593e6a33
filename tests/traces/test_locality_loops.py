"""The numbers of locality against plain loops over random traces."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.routings import rng, same, traces
from traces import NOT_ROUTED, Trace, segments
from traces.locality import (
    SPANS,
    batch_unions,
    overlap_profile,
    popularity_overlap,
    working_set,
)
from traces.schedule import by_sequence
from traces.segments import segment_hits, segment_routing
from traces.stats import neighbour_overlap


def routed(trace: Trace, layer: int) -> list[list[set[int]]]:
    """The experts of each token, by sequence in order of first appearance."""
    order = by_sequence(trace)
    sets = [set(chosen) - {NOT_ROUTED} for chosen in trace.expert_ids[order.rows, layer].tolist()]
    bounds = [*order.starts.tolist(), len(sets)]
    return [sets[start:end] for start, end in pairwise(bounds)]


def ratio(over: float, under: float) -> float:
    return over / under if under else math.nan


def slow_overlap(trace: Trace, layer: int, lag: int) -> float:
    pairs = [
        (tokens[i - lag], tokens[i])
        for tokens in routed(trace, layer)
        for i in range(lag, len(tokens))
        if tokens[i - lag]
    ]
    return ratio(sum(len(old & new) for old, new in pairs), sum(len(new) for _, new in pairs))


def slow_any_two(trace: Trace, layer: int) -> float:
    tokens = [chosen for sequence in routed(trace, layer) for chosen in sequence if chosen]
    shared = sum(2 * len(one & other) for one, other in combinations(tokens, 2))
    return ratio(shared, (len(tokens) - 1) * sum(map(len, tokens)))


def slow_working_set(trace: Trace, layer: int, span: int) -> float:
    sizes = [
        len(set().union(*tokens[start : start + span]))
        for tokens in routed(trace, layer)
        for start in range(len(tokens) - span + 1)
    ]
    return ratio(sum(sizes), len(sizes))


def slow_union(trace: Trace, layer: int, batch: int) -> float:
    phases = np.split(trace.phase[by_sequence(trace).rows], by_sequence(trace).starts[1:])
    events: dict[Any, list[set[int]]] = {}
    for lane, (tokens, phase) in enumerate(zip(routed(trace, layer), phases, strict=True)):
        seen: Counter[int] = Counter()
        for chosen, own in zip(tokens, phase.tolist(), strict=True):
            events.setdefault((lane // batch, own, seen[own]), []).append(chosen)
            seen[own] += 1
    sizes = [len(set().union(*met)) for met in events.values() if len(met) == batch]
    return ratio(sum(sizes), len(sizes))


def slow_srp(trace: Trace, layers: list[int], window: int) -> float:
    counts: list[int] = []
    for layer in layers:
        for tokens in routed(trace, layer):
            for start in range(len(tokens) - window + 1):
                counts += Counter(expert for chosen in tokens[start : start + window] for expert in chosen).values()
    act = sum(counts)
    scores = [
        2 * sum(c for c in counts if c >= t) / (act + window * sum(c >= t for c in counts)) if act else math.nan
        for t in range(1, window + 1)
    ]
    return max(scores)


def slow_sch(trace: Trace, layer: int, window: int, slots: int) -> float:
    hits = total = 0
    for tokens in routed(trace, layer):
        last: dict[int, int] = {}
        for i, chosen in enumerate(tokens):
            used = Counter(expert for later in tokens[i : i + window] for expert in later)
            worth = {e: (used[e], last.get(e, -1), e in chosen) for e in range(trace.header.experts)}
            held = sorted(worth, key=lambda e: worth[e], reverse=True)[:slots]
            hits += len(chosen & set(held))
            total += len(chosen)
            last |= dict.fromkeys(chosen, i)
    return ratio(hits, total)


@given(trace=traces(), piece=st.sampled_from([1, 40, 10_000]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_number_is_what_plain_loops_give(trace: Trace, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "PIECE_ELEMENTS", piece)
    layers, experts = range(trace.header.layers), trace.header.experts
    windows = [1, 2, 3, 5]
    same(popularity_overlap(trace), [slow_any_two(trace, layer) for layer in layers])
    same(
        overlap_profile(trace, [1, 2, 4]), [[slow_overlap(trace, layer, lag) for layer in layers] for lag in (1, 2, 4)]
    )
    same(overlap_profile(trace, [1])[0], neighbour_overlap(trace))
    same(working_set(trace)[0][:4], [[slow_working_set(trace, layer, span) for layer in layers] for span in SPANS[:4]])
    same(batch_unions(trace, [1, 2, 3])[0], [[slow_union(trace, layer, b) for layer in layers] for b in (1, 2, 3)])
    for found, window in zip(segment_routing(trace, rng(), windows, resamples=2), windows, strict=True):
        same(found.model.srp, [slow_srp(trace, list(layers), window)])
        same(found.layers.srp, [slow_srp(trace, [layer], window) for layer in layers])
    wanted = [[[slow_sch(trace, la, window, c) for c in range(experts + 1)] for la in layers] for window in windows]
    same(segment_hits(trace, windows), wanted)
