"""Curves from one pass: traced by hand, and against a replay at each capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.replay import Capacity, Feed, Settings
from sim.replay.curves import HEURISTIC, ONE_PASS, POINTS, Curve, curve, points, sampled
from sim.replay.run import replay
from sim.replay.settings import ORDERS
from tests.sim.hand import trace_of
from tests.sim.replaying import feeds, trace_of_rows
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Phase
from traces.shipped import find_trace
from traces.store import load

COMBINATIONS = pytest.mark.parametrize("contract", ["atomic", "serial"])
SCOPES = pytest.mark.parametrize("scope", ["layer", "global"])
POLICIES = pytest.mark.parametrize("policy", ONE_PASS)


def feed_of(steps: Sequence[Sequence[int]], layers: int = 1, experts: int = 4) -> Feed:
    """One sequence; a step is the union of one decode token, the same in every layer."""
    return Feed.of(trace_of([[step] * layers for step in steps], experts=experts))


def hits(feed: Feed, policy: str = "lru", **way: Any) -> list[int]:
    return curve(feed, policy, **way).hits_union.sum(axis=0).tolist()


# By hand.


@COMBINATIONS
def test_lru_on_the_golden_trace(contract: Any) -> None:
    """Distances of a layer, the most recent first: {0,1} new [1 0]; {0,2} 0 at 2 [2 0 1]; {0,1} 0 at 2, 1 at 3 [1 0 2];
    {0,3} 0 at 2 [3 0 1 2]; {0,1} 0 at 2, 1 at 3. One after the other, 0 comes before the other and has the same."""
    feed = feed_of([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]], layers=3)
    found = curve(feed, "lru", contract=contract)
    assert found.capacities.tolist() == [1, 2, 3, 4]
    assert found.hits_union.tolist() == [[0] * 4, [0, 12, 18, 18]]
    assert found.hits_assignments.tolist() == found.hits_union.tolist()
    assert found.accesses.tolist() == found.assignments.tolist() == [0, 30]


def test_at_once_the_last_of_an_event_is_on_top_and_one_by_one_the_first_is_under_it() -> None:
    feed = feed_of([[0, 1], [0, 1]])
    assert hits(feed, contract="atomic") == [1, 2, 2, 2]
    assert hits(feed, contract="serial") == [0, 2, 2, 2]
    assert hits(feed_of([[0, 1], [1, 0]]), contract="serial") == [1, 2, 2, 2]
    assert hits(feed_of([[0, 1], [1, 0]]), contract="serial", order="ascending") == [0, 2, 2, 2]


@COMBINATIONS
def test_belady_on_one_expert_after_the_other(contract: Any) -> None:
    """0 0 1 2 0 3 0 1: one slot keeps 0 for its three uses and lets the rest pass; a second one keeps 1 for its last
    use; a third holds nothing that comes again."""
    feed = feed_of([[expert] for expert in (0, 0, 1, 2, 0, 3, 0, 1)])
    assert hits(feed, "belady", contract=contract) == [3, 4, 4, 4]
    assert hits(feed, "lru", contract=contract) == [1, 2, 3, 4]


def test_of_two_blocks_that_come_back_together_belady_keeps_the_last_used() -> None:
    """0, then 1, then both in one event, in which 1 has three of four tokens."""
    for last in (0, 1):
        ids = np.full((6, 1, 2), NOT_ROUTED, np.uint16)
        ids[[0, 1, 2, 3, 4, 5], 0, 0] = [1 - last, last, 0, 1, 1, 1]
        trace = trace_of_rows(ids, [(6, 0)], [100], np.ones((6, 1, 2)))
        trace = replace(trace, step=np.array([0, 1, 2, 2, 2, 2], np.int32))
        found = curve(Feed.of(trace), "belady")
        assert found.hits_union.tolist() == [[1, 2], [0, 0]]
        assert found.hits_assignments.tolist() == [[3 if last else 1, 4], [0, 0]]


def test_lru_by_bytes_reaches_down_through_sizes() -> None:
    """Layers of 100 and 60 bytes in one pool, one expert each: uses A0 B0 A1 B0 A0. B0 lies under A1 (160 bytes), and
    A0 then under B0 and A1 (260)."""
    ids = np.full((3, 2, 1), NOT_ROUTED, np.uint16)
    ids[:, :, 0] = [[0, 0], [1, 0], [0, NOT_ROUTED]]
    feed = Feed.of(trace_of_rows(ids, [(0, 3)], [100, 60], np.ones((3, 2, 2))))
    found = curve(feed, scope="global", unit="bytes", capacities=[100, 159, 160, 259, 260, 320])
    assert found.hits_union.sum(axis=0).tolist() == [0, 0, 1, 1, 2, 2]
    assert found.exact


def test_warming_up_and_phases_are_counted_apart() -> None:
    ids = np.zeros((5, 1, 1), np.uint16)
    trace = trace_of_rows(ids, [(2, 3)], [100], np.ones((5, 1, 2)), cut=True)
    found = curve(Feed.of(trace))
    assert found.hits_union[:, 0].tolist() == [1, 3]
    assert found.accesses.tolist() == [2, 3]
    warm = curve(Feed.of(trace, warmup_steps=3))
    assert warm.hits_union[:, 0].tolist() == warm.accesses.tolist() == [0, 2]
    with pytest.raises(InputError, match="phase must be one that the trace has, got prefill"):
        warm.frame("prefill")


# Against the replay.


def counts(feed: Feed, found: Curve, place: int, **more: Any) -> list[list[int]]:
    """Hits by assignment and union, and what they are counted of, by phase, from a replay at one capacity."""
    way = Settings(
        found.policy,
        Capacity(int(found.capacities[place]), found.unit, ""),
        scope=found.scope,
        contract=found.contract,
        order=found.order,
        sequences=found.sequences,
        seed=found.seed,
    )
    outcome = replay(feed, way, **more)
    names = ("hit_assignments", "hits", "assignments", "accesses")
    return [[int(outcome.groups(phase)[name].sum()) for name in names] for phase in ("prefill", "decode")]


def counted(found: Curve, place: int) -> list[list[int]]:
    tables = (found.hits_assignments[:, place], found.hits_union[:, place], found.assignments, found.accesses)
    return np.stack(tables, axis=1).tolist()


@POLICIES
@SCOPES
@COMBINATIONS
@settings(max_examples=40)
@given(data=st.data())
def test_a_curve_is_a_replay_at_each_capacity(policy: str, scope: Any, contract: Any, data: st.DataObject) -> None:
    unit: Any = data.draw(st.sampled_from(["slots", "bytes"]))
    mixed = policy == "belady" and scope == "global" and unit == "bytes"  # sizes must not
    feed = data.draw(feeds(warm=True, unequal=False if mixed else None))
    sizes = feed.trace.header.expert_bytes
    if unit == "bytes" and scope == "layer" and max(sizes) * len(sizes) > sum(sizes) * feed.trace.header.experts:
        unit = "slots"  # an even share of all bytes does not hold the largest expert
    found = curve(
        feed,
        policy,
        scope=scope,
        contract=contract,
        order=data.draw(st.sampled_from(ORDERS)),
        sequences=data.draw(st.sampled_from(["carry", "fresh"])),
        seed=data.draw(st.integers(0, 9)),
        unit=unit,
    )
    assert found.exact
    place = data.draw(st.integers(0, len(found.capacities) - 1))
    assert counted(found, place) == counts(feed, found, place, by_object=True)


@cache
def shipped() -> Feed:
    return Feed.of(load(find_trace("batch4")), batch=4)


@POLICIES
@SCOPES
@COMBINATIONS
def test_the_curves_of_a_shipped_trace_are_those_of_its_replays(policy: str, scope: Any, contract: Any) -> None:
    found = curve(shipped(), policy, scope=scope, contract=contract)
    for place in (0, len(found.capacities) // 4, len(found.capacities) // 2):
        assert counted(found, place) == counts(shipped(), found, place)


@POLICIES
@settings(max_examples=25)
@given(feed=feeds(), fresh=st.booleans())
def test_more_room_never_hits_less_and_all_of_it_misses_first_uses_alone(policy: str, feed: Feed, fresh: bool) -> None:
    found = curve(feed, policy, scope="global", sequences="fresh" if fresh else "carry")
    assert (np.diff(found.hits_union, axis=1) >= 0).all()
    assert (np.diff(found.hits_assignments, axis=1) >= 0).all()
    way = Settings("lru", Capacity(int(found.capacities[-1]), "slots", ""), scope="global", sequences=found.sequences)
    first = replay(feed, way, by_object=True).groups()["compulsory"].sum()
    assert found.accesses.sum() - found.hits_union[:, -1].sum() == first


@SCOPES
@COMBINATIONS
@settings(max_examples=25)
@given(feed=feeds())
def test_belady_hits_as_many_distinct_experts_as_lru_or_more(scope: Any, contract: Any, feed: Feed) -> None:
    lru, bound = (curve(feed, policy, scope=scope, contract=contract) for policy in ONE_PASS)
    assert (lru.hits_union.sum(axis=0) <= bound.hits_union.sum(axis=0)).all()


def test_a_long_stream_uses_up_the_places_of_the_stack_many_times() -> None:
    rng = np.random.default_rng(0)
    steps = [[expert] for expert in rng.integers(0, 40, 3000).tolist()]
    stack: list[int] = []
    found = np.zeros(41, int)
    for (expert,) in steps:
        found[stack.index(expert) + 1 if expert in stack else 0] += 1
        stack = [expert, *(other for other in stack if other != expert)]
    assert hits(feed_of(steps, experts=40)) == found[1:].cumsum().tolist()


# The heuristic.


def unequal(feed: Feed) -> Feed:
    header = feed.trace.header
    sizes = tuple(100 + 40 * (layer % 3) for layer in range(header.layers))
    return Feed.of(replace(feed.trace, header=header.model_copy(update={"expert_bytes": sizes})))


def test_belady_over_unequal_experts_says_that_it_is_a_heuristic() -> None:
    feed = unequal(shipped())
    found = curve(feed, "belady", scope="global", unit="bytes")
    assert not found.exact
    assert found.note == HEURISTIC
    assert not found.frame()["exact"].any()
    assert len(found.capacities) == POINTS
    whole = curve(feed, "lru", scope="global", unit="bytes")
    assert counted(found, -1) == counted(whole, -1)
    assert curve(feed, "belady", unit="bytes").exact, "in a layer's pool all weigh the same"
    assert curve(feed, "belady", scope="global").exact, "a slot holds any expert"


def test_the_heuristic_is_near_the_replay_of_the_policy() -> None:
    feed = unequal(shipped())
    found = curve(feed, "belady", scope="global", unit="bytes")
    for place in (POINTS // 4, POINTS // 2):
        near = np.array(counted(found, place)) - np.array(counts(feed, found, place))
        assert np.abs(near[:, 0]).sum() < 0.01 * found.assignments.sum()


# What a person gets.


def test_the_frame_has_the_whole_cache() -> None:
    feed = unequal(shipped())
    layer = curve(feed).frame("decode")
    assert layer["capacity_slots"].tolist() == [8 * slots for slots in range(1, 33)]
    assert layer["capacity_share"].tolist() == pytest.approx([slots / 32 for slots in range(1, 33)])
    assert layer["capacity_bytes"].iloc[0] == sum(feed.trace.header.expert_bytes)
    assert set(layer["phase"]) == {"decode"}
    pool = curve(feed, scope="global").frame()
    assert len(pool) == 8 * 32
    assert pool["capacity_bytes"].isna().all()
    by_bytes = curve(feed, scope="global", unit="bytes", capacities=[4480, 2240]).frame()
    assert by_bytes["capacity_bytes"].tolist() == [2240, 4480]
    assert by_bytes["capacity_slots"].isna().all()
    whole = 32 * sum(feed.trace.header.expert_bytes)
    assert by_bytes["capacity_share"].tolist() == pytest.approx([2240 / whole, 4480 / whole])


@SCOPES
def test_points_stand_on_the_curve(scope: Any) -> None:
    capacities = [Capacity.slots(text, shipped().trace.header, scope) for text in ("12.5%", "50%")]
    replays = sampled(shipped(), Settings("lru", capacities[0], scope=scope), capacities)
    frame, line = points(replays, "decode"), curve(shipped(), scope=scope).frame("decode")
    assert frame.columns.tolist() == line.columns.tolist()
    assert frame.dtypes.tolist() == line.dtypes.tolist()
    both = frame.merge(line, on=line.columns.tolist())
    assert both["capacity_share"].tolist() == [0.125, 0.5]


def test_the_knee_is_where_another_slot_no_longer_pays() -> None:
    """Of 20 uses, one slot hits 8 of 0 and then 3 of 2; a second one adds 2 of 1 and 3 of 3; a third adds nothing."""
    steps = [[0], [0], [1], [0], [0], [1], [0], [0], [1], [0], [0], [0]]
    found = curve(feed_of([*steps, *[[2], [3]] * 4], experts=8), "belady")
    gains = np.diff(found.hits_union[Phase.DECODE], prepend=0)
    assert gains.tolist() == [11, 5, 0, 0, 0, 0, 0, 0]
    assert [found.capacities[found.knee(gain)] for gain in (0.6, 0.26, 0.24, 0.0)] == [1, 1, 2, 2]
    assert found.capacities[found.knee()] == 2, "an even share of eight slots is 0.125"


def test_a_step_behind_a_flat_part_is_not_missed() -> None:
    """A loop over three experts: nothing hits below three slots."""
    found = curve(feed_of([[0], [1], [2]] * 10))
    assert found.hits_union[Phase.DECODE].tolist() == [0, 0, 27, 27]
    assert found.capacities[found.knee()] == 3


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"policy": "lfu"}, "policy must be lru or belady to have a curve from one pass, got 'lfu'"),
        ({"capacities": [0]}, "capacity must be between 1 and 32 slots of a pool, got 0"),
        ({"capacities": [33]}, "capacity must be between 1 and 32 slots of a pool, got 33"),
        ({"capacities": []}, "capacities must name at least one, got none"),
        ({"unit": "bytes", "capacities": [99]}, "capacity must be between 147456 and 4718592 bytes of a pool, got 99"),
    ],
)
def test_a_curve_that_cannot_be(way: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        curve(shipped(), **way)


def test_experts_without_bytes_have_no_capacity_in_bytes() -> None:
    header = shipped().trace.header.model_copy(update={"expert_bytes": (1, 0, *[1] * 6)})
    with pytest.raises(InputError, match="expert_bytes must be above 0 for capacities in bytes, got 0 in layer 1"):
        curve(Feed.of(replace(shipped().trace, header=header)), unit="bytes")


def test_progress_is_told_every_pass() -> None:
    told: list[int] = []
    curve(shipped(), progress=told.append)
    assert sum(told) == len(shipped().plan)
