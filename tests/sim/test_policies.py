"""Eviction and prefetch policies alone, on cases worked out by hand; placements have a file of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.policies import EVICTION, PREFETCH, PolicyContext, PrefetchView
from sim.policies.base import NEVER
from tests.sim.hand import HandCosts, misses_by_step, run, trace_of

CONTEXT = PolicyContext(layers=2, experts=4, top_k=2)


class Timetable:
    """A future that is written down: block -> events in which it is used."""

    def __init__(self, uses: dict[int, list[int]]) -> None:
        self.uses = uses

    def next_use(self, block: int, event: int) -> int:
        return next((use for use in self.uses.get(block, []) if use > event), NEVER)


def test_lru_ranks_by_the_last_use() -> None:
    last_use = [3, 7, 0, 1, 5]
    assert EVICTION["lru"](CONTEXT).order([0, 1, 4], last_use) == [0, 4, 1]
    assert EVICTION["lru"](CONTEXT).by_recency


def test_lfu_ranks_by_events_and_not_by_tokens() -> None:
    policy = EVICTION["lfu"](CONTEXT)
    policy.observe(0, [0, 1], [9, 1])
    policy.observe(1, [1], [1])
    assert [*policy.keys([0, 1, 2])] == [1, 2, 0]
    policy.forget(1)
    assert [policy.key(block) for block in (0, 1, 2)] == [1, 0, 0]


def test_belady_ranks_by_the_next_use_after_the_event() -> None:
    future = Timetable({0: [0, 4], 1: [0, 2, 6], 2: [0]})
    policy = EVICTION["belady"](PolicyContext(1, 4, 3, future))
    policy.observe(0, [0, 1, 2], [1, 1, 1])
    assert [*policy.keys([0, 1, 2])] == [policy.key(block) for block in (0, 1, 2)] == [-4, -2, -NEVER]
    policy.observe(2, [1], [1])
    assert policy.key(1) == -6


def test_belady_without_a_future_is_refused() -> None:
    with pytest.raises(ValueError, match="belady must be given the future routing, got none"):
        EVICTION["belady"](CONTEXT)


def expecting(layer: int, *named: list[int]) -> PrefetchView:
    expected = [[(expert, 1) for expert in experts] for experts in named]
    return PrefetchView(layer, layer, expected, lambda block: False, lambda hits, misses: 0.0, 1.0)


def test_no_prefetch_wants_nothing() -> None:
    assert [*PREFETCH["none"](CONTEXT).candidates(expecting(0, [1, 2]))] == []


def test_next_router_wants_the_next_layer_in_the_order_of_the_prediction() -> None:
    policy, experts = PREFETCH["next-router"](CONTEXT), CONTEXT.experts
    assert [*policy.candidates(expecting(3, [2, 0]))] == [4 * experts + 2, 4 * experts]
    assert [*policy.candidates(expecting(3))] == []


def test_next_router_looks_as_deep_and_as_wide_as_it_is_told() -> None:
    policy = PREFETCH["next-router"](replace(CONTEXT, options={"depth": 2, "width": 1}))
    assert type(policy).depth({"depth": 2}) == 2
    experts = CONTEXT.experts
    assert [*policy.candidates(expecting(0, [2, 0], [1]))] == [experts + 2, 2 * experts + 1]


@pytest.mark.parametrize(("option", "rule"), [("depth", "depth must be from 1 to 3"), ("width", "width must be")])
def test_next_router_refuses_a_depth_that_no_trace_has(option: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PREFETCH["next-router"](replace(CONTEXT, options={option: -1}))


# One layer, one expert a token, two slots. The same sequence of experts separates the policies.

SEQUENCE = [0, 0, 1, 2, 0, 3, 0, 1]


@pytest.mark.parametrize(
    ("evict", "missed"),
    [
        # cache after each:      0   0   01  12  20  03  03  01
        ("lru", [1, 0, 1, 1, 1, 1, 0, 1]),
        # 0 has two uses when 2 comes: 1 leaves, and 0 stays
        ("lfu", [1, 0, 1, 1, 0, 1, 0, 1]),
        # 2 and 3 never come again: they pass through, 0 and 1 stay
        ("belady", [1, 0, 1, 1, 0, 1, 0, 0]),
    ],
)
def test_one_sequence_by_three_policies(evict: str, missed: list[int]) -> None:
    result = run(trace_of([[[expert]] for expert in SEQUENCE]), 2, evict=evict)
    assert misses_by_step(result) == [[miss] for miss in missed]


def test_lfu_forgets_what_has_left() -> None:
    """0 is used most often in all, but it leaves, and starts again from nothing: its one use of the second stay is
    fewer than the two of 1, so that 3 pushes it out again."""
    sequence = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 3, 1, 2]
    # cache: 0 and 1 until 2 comes (uses 3 and 4: 0 leaves); 0 comes (uses 4 and 5: 1 leaves); 3 pushes out 0 (1 and 5)
    result = run(trace_of([[[expert]] for expert in sequence]), 2, evict="lfu")
    assert [row[0] for row in misses_by_step(result)] == [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]


def test_lfu_forgets_what_was_streamed() -> None:
    """Unions of three pass by a cache of two: 0 is used twice without being kept. When it stays at last, it has one
    use, fewer than the two of its neighbour, and leaves for 3."""
    result = run(trace_of([[[0, 1, 2]], [[0, 1, 2]], [[0]], [[3]], [[0]]]), 2, evict="lfu")
    assert misses_by_step(result) == [[3], [1], [1], [1], [1]]


def test_lfu_forgets_what_was_computed_on_the_cpu() -> None:
    """In layer 1, 2 is computed on the CPU three times, and then prefetched and used once. That is less than the two
    uses of 0, so that the prefetch of 3 pushes 2 out, and 0 is still there at the end."""
    used = [[0, 1], [2], [2], [2], [0], [2], [3], [0]]
    predicted: list[list[int]] = [[], [], [], [], [], [2], [3], []]
    trace = trace_of([[[0], experts] for experts in used], lookahead=[[experts, []] for experts in predicted])
    system = {"evict": "lfu", "place": "cpu-on-miss", "prefetch": "next-router"}
    layers = run(trace, 2, HandCosts(copy=0.25), **system).layers
    assert layers[layers["layer"] == 1]["misses"].tolist() == [2, 1, 1, 1, 0, 0, 0, 0]
