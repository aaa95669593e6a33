"""Bytes that a pass loads, where experts differ in size: quantiles over the passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.compiled.counts import COLUMNS
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import PHASES
from sim.replay.run import replay
from tests.sim.formulas import unequal
from tests.sim.hand import trace_of
from tests.sim.replaying import play, traces, ways

BOTH_WAYS = pytest.mark.parametrize("by_object", [False, True])
QUANTILES = ("bytes_a_step_p50", "bytes_a_step_p95", "bytes_a_step_p99", "bytes_a_step_max")


@BOTH_WAYS
@pytest.mark.parametrize("contract", ["atomic", "serial"])
@pytest.mark.parametrize(("warmup", "expected"), [(0, [60, 160, 160, 160]), (1, [60, 100, 100, 100])])
def test_quantiles_of_the_bytes_of_a_pass(warmup: int, expected: list[int], contract: Any, by_object: bool) -> None:
    """Four passes load blocks of 100 and 60 bytes, one of 60, one of 100, and nothing; the first may be warm-up."""
    trace = unequal(trace_of([[[0], [1]], [[0], [2]], [[1], [2]], [[1], [2]]], experts=3))
    way = Settings("lru", Capacity(3, "slots", ""), contract=contract)
    row = replay(Feed.of(trace, warmup_steps=warmup), way, by_object=by_object).row()
    assert [row[name] for name in QUANTILES] == expected


@BOTH_WAYS
def test_equal_bytes_are_misses_times_the_size(by_object: bool) -> None:
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 3]]], experts=4)
    outcome = replay(Feed.of(trace), Settings("lru", Capacity(2, "slots", "")), by_object=by_object)
    size = trace.header.expert_bytes[0]
    assert outcome.loads.size == 0
    assert [outcome.row()[name] for name in QUANTILES] == [size, 2 * size, 2 * size, 2 * size]


@pytest.mark.parametrize("name", ["lru", "arc", "belady"])
@pytest.mark.parametrize("contract", ["atomic", "serial"])
@settings(max_examples=15)
@given(data=st.data())
def test_the_bytes_of_the_passes_add_up_to_the_bytes_loaded(name: str, contract: str, data: Any) -> None:
    trace = data.draw(traces(unequal=True).filter(lambda trace: len(set(trace.header.expert_bytes)) > 1))
    plan = Feed.of(trace).plan
    feed = Feed.of(trace, warmup_steps=data.draw(st.integers(0, len(plan) - 1)))
    way = data.draw(ways(trace, name, contract, "layer"))
    compiled, by_object = play(feed, way), play(feed, way, by_object=True)
    assert compiled.loads.tolist() == by_object.loads.tolist()
    assert compiled.loads.sum() == compiled.table[:, COLUMNS.index("bytes")].sum()
    loads, phases = compiled.loads[feed.warmup_steps :], plan.phase[feed.warmup_steps :]
    for phase, numbers in PHASES.items():
        own = loads[np.isin(phases, numbers)]
        if len(own):
            assert own.sum() == compiled.groups(phase)["bytes"].sum()
            for q in (0.0, 0.25, 0.5, 1.0):
                assert compiled.bytes_quantile(q, phase) == np.quantile(own, q, method="inverted_cdf")
