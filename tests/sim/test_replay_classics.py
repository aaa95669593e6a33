"""The general-purpose eviction policies, traced by hand, and each beside its compiled twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.compiled.stream import mixed as compiled_mixed
from sim.compiled.twins import TWINS
from sim.policies import EVICTION, PolicyContext
from sim.policies.evict.random import mixed
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.run import replay
from traces.schema import NOT_ROUTED, Trace, TraceHeader

CLASSICS = [
    "arc",
    "belady",
    "belady-forced",
    "fifo",
    "lfru",
    "lfu",
    "lfu-decay",
    "lfu-global",
    "lru",
    "random",
    "s3fifo",
    "sieve",
]


def trace_of(ids: Any, *, experts: int, sizes: tuple[int, ...] | None = None, sequences: Any = None) -> Trace:
    """Decode tokens with ``ids`` [T, L, K]; ``sequences`` [T] not decreasing."""
    ids = np.asarray(ids, np.uint16)
    tokens, layers, top_k = ids.shape
    sequence = np.zeros(tokens, int) if sequences is None else np.asarray(sequences)
    position = np.arange(tokens) - np.searchsorted(sequence, sequence)
    header = TraceHeader(model="hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=sizes or (1,) * layers)
    return Trace.of(
        header,
        expert_ids=ids,
        token_ids=np.zeros(tokens),
        sequence=sequence,
        position=position,
        step=np.arange(tokens),
        phase=np.ones(tokens),
    )


def capacity_of(amount: int, unit: Any = "slots") -> Capacity:
    return Capacity(amount, unit, f"{amount} {unit}")


def departures(result: Replay) -> list[tuple[int, int, int]]:
    """(decision, block, kind), with the decisions that made any counted from 0."""
    decisions = np.unique(result.log[:, 0], return_inverse=True)[1]
    return sorted(zip(decisions.tolist(), *result.log[:, 1:].T.tolist(), strict=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Feed, dict[str, Any]]:
    """A small random trace, batched or not, with everything but the policy that a replay can be asked for."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    top_k, tokens = draw(st.integers(1, min(3, experts))), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    likely = rng.random((tokens, layers, experts)) ** (1 + np.arange(experts))
    ids = np.argsort(-likely, axis=-1)[..., :top_k].astype(np.uint16)
    ids[rng.random(ids.shape) < 0.05] = NOT_ROUTED
    ids[0, 0, 0] = 0 if 0 not in ids[0, 0] else ids[0, 0, 0]
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers)))
    sequences = np.sort(rng.integers(0, draw(st.integers(1, 4)), tokens))
    trace = trace_of(ids, experts=experts, sizes=sizes, sequences=np.unique(sequences, return_inverse=True)[1])
    scope = draw(st.sampled_from(["layer", "global"]))
    held = experts * (layers if scope == "global" else 1)
    by_bytes = draw(st.booleans())
    least, most = (max(sizes), held * max(sizes)) if by_bytes else (1, held)
    asked = {
        "capacity": capacity_of(draw(st.integers(least, most)), "bytes" if by_bytes else "slots"),
        "scope": scope,
        "contract": draw(st.sampled_from(["atomic", "serial"])),
        "order": draw(st.sampled_from(["as-routed", "ascending", "shuffled"])),
        "sequences": draw(st.sampled_from(["carry", "fresh"])),
        "seed": draw(st.integers(0, 99)),
    }
    return Feed.of(trace, batch=draw(st.integers(1, 3)), warmup_steps=0), asked


@pytest.mark.parametrize("name", CLASSICS)
@given(case=cases())
@settings(max_examples=30)
def test_twin_decides_as_its_object(name: str, case: tuple[Feed, dict[str, Any]]) -> None:
    feed, asked = case
    options = {"window": 7} if name == "lfu-decay" else {"small": 0.4} if name == "s3fifo" else {}
    how = Settings(name, **asked, options=options)
    assert EVICTION[name] in TWINS
    compiled, by_object = replay(feed, how, log=True), replay(feed, how, log=True, by_object=True)
    assert compiled.table.tolist() == by_object.table.tolist()
    assert departures(compiled) == departures(by_object)
    assert compiled.histogram.tolist() == by_object.histogram.tolist()


# One layer, one expert a token: block by block, every departure written down as (access, block).


def departed(
    name: str, accesses: list[Any], slots: int, *, by_object: bool = False, **options: Any
) -> list[tuple[int, int, int]]:
    """(event, block, 1 for used without being kept) under the atomic contract; an access may be a list of experts."""
    unions = [access if isinstance(access, list) else [access] for access in accesses]
    width = max(map(len, unions))
    ids = [[[*union, *[NOT_ROUTED] * (width - len(union))]] for union in unions]
    feed = Feed.of(trace_of(ids, experts=8))
    result = replay(feed, Settings(name, capacity_of(slots), options=options), log=True, by_object=by_object)
    return [(event, block, kind) for event, block, kind in result.log.tolist()]


GOLDEN: dict[str, tuple[int, list[int], dict[str, Any], list[tuple[int, int]]]] = {
    "lru": (3, [0, 1, 2, 0, 3, 1, 4, 0], {}, [(4, 1), (5, 2), (6, 0), (7, 3)]),
    "fifo": (3, [0, 1, 2, 0, 3, 1, 4, 0], {}, [(4, 0), (6, 1), (7, 2)]),
    # 1 has one use of its present stay when 4 comes; 2 and 4 have two each when 5 comes
    "lfu": (3, [0, 0, 1, 2, 2, 3, 1, 4, 0, 4, 5], {}, [(5, 1), (6, 3), (7, 1), (10, 2)]),
    # when 4 comes, 0, 2 and 1 have two each
    "lfu-global": (
        3,
        [0, 0, 1, 2, 2, 3, 1, 4, 0, 4, 5],
        {},
        [(5, 1), (6, 3), (7, 0), (8, 4), (9, 2), (10, 1)],
    ),
    # at 7: four uses of 0, halved, against three of 1; at 8: three of 1, halved, against one of 2, halved
    "lfu-decay": (2, [0, 0, 0, 0, 1, 1, 1, 2, 0], {"window": 4}, [(7, 0), (8, 2)]),
    # at 4: 3/3 against 1/2; at 7: 3/6 against 3/2; at 8: 3/3 against 1/2
    "lfru": (2, [0, 0, 0, 1, 2, 2, 2, 3, 1], {}, [(4, 1), (7, 0), (8, 3)]),
    # at 4 the hand clears 0 and takes 1; at 6 it clears 2, takes 3, the youngest, and is back at the oldest;
    # at 11 it clears all three, and takes the first of them
    "sieve": (3, [0, 1, 2, 0, 3, 2, 4, 5, 2, 4, 5, 6], {}, [(4, 1), (6, 3), (7, 0), (11, 2)]),
    # small 0 1, main 2 3 4; at 8, 0 is promoted and 1 goes to the ghost; at 9, 1 returns: main 2 3 4 0 is above its
    # three slots, 2 gets another round; at 10, main 4 0 2 1 is still above; at 11 the small queue gives way
    "s3fifo": (5, [0, 1, 2, 3, 4, 0, 0, 2, 5, 1, 3, 6], {"small": 0.4}, [(8, 1), (9, 3), (10, 4), (11, 5)]),
    # p is 1 from 4, where 1 comes back from B1, to 5, where 0 comes back from B2; at 7, 2 is dropped from B1
    "arc": (
        2,
        [0, 1, 0, 2, 1, 0, 3, 4, 2, 1],
        {},
        [(3, 1), (4, 0), (5, 2), (6, 1), (7, 3), (8, 4), (9, 2)],
    ),
    # of 1 and 3, neither of which comes again, 1 was used longer ago
    "belady-forced": (2, [0, 1, 2, 0, 1, 3, 0], {}, [(2, 1), (4, 2), (5, 1)]),
}


@pytest.mark.parametrize("by_object", [False, True], ids=["compiled", "object"])
@pytest.mark.parametrize("name", GOLDEN)
def test_who_leaves_one_by_one(name: str, by_object: bool) -> None:
    slots, accesses, options, expected = GOLDEN[name]
    found = departed(name, accesses, slots, by_object=by_object, **options)
    assert found == [(event, block, 0) for event, block in expected]


@pytest.mark.parametrize("by_object", [False, True], ids=["compiled", "object"])
def test_belady_passes_by_what_does_not_come_again(by_object: bool) -> None:
    """2 never comes again, and is not kept; 3 neither, but 1 was used longer ago."""
    assert departed("belady", [0, 1, 2, 0, 1, 3, 0], 2, by_object=by_object) == [(2, 2, 1), (5, 1, 0)]


@pytest.mark.parametrize("by_object", [False, True], ids=["compiled", "object"])
@pytest.mark.parametrize(
    ("name", "unions", "expected"),
    [
        # at 2, the hits 0 and 3 are in the queue, so that the missing 1 is the one that is not kept
        ("sieve", [[0, 1, 2], [0, 3], [0, 1, 3]], [(0, 0, 1), (1, 1, 0), (1, 2, 0), (2, 1, 1)]),
        ("s3fifo", [[0, 1, 2], [0, 3], [0, 1, 3]], [(0, 0, 1), (1, 1, 0), (1, 2, 0), (2, 1, 1)]),
        ("arc", [[0, 1, 2], [0, 3], [0, 1, 3]], [(0, 0, 1), (1, 1, 0), (1, 2, 0), (2, 1, 1)]),
        # the older arrivals leave before what has not arrived: of 0, 1 and 3, block 0
        ("fifo", [[0, 1, 2], [0, 3], [0, 1, 3]], [(0, 0, 1), (1, 1, 0), (1, 2, 0), (2, 0, 0)]),
        # the hit 0 leaves before the misses 2 and 3
        ("belady-forced", [[0, 1], [0, 2, 3], [0]], [(1, 1, 0), (1, 0, 0), (2, 2, 0)]),
    ],
)
def test_who_leaves_when_an_event_does_not_fit(
    name: str, unions: list[Any], expected: list[tuple[int, int, int]], by_object: bool
) -> None:
    assert departed(name, unions, 2, by_object=by_object) == expected


def test_sieve_passes_over_the_experts_of_the_event() -> None:
    """The hand clears the bit of 0, which is used by the event, and leaves it; on its next way it takes 0."""
    assert departed("sieve", [0, 1, [0, 2], 3], 2) == [(2, 1, 0), (3, 0, 0)]


def test_random_draws_by_the_seed_and_hits_all_alike() -> None:
    accesses = np.random.default_rng(1).integers(0, 8, 4000)
    feed = Feed.of(trace_of(accesses[:, None, None], experts=8))
    runs = {seed: replay(feed, Settings("random", capacity_of(4), seed=seed), log=True).log.tolist() for seed in (0, 1)}
    assert runs[0] == replay(feed, Settings("random", capacity_of(4), seed=0), log=True).log.tolist()
    assert runs[0] != runs[1]
    share = np.bincount(np.array(runs[0])[:, 1], minlength=8) / len(runs[0])
    assert share == pytest.approx(np.full(8, 1 / 8), abs=0.03)


@given(st.integers(0, 2**31), st.integers(0, 2**40), st.integers(0, 2**20))
def test_both_draw_the_same_numbers(seed: int, number: int, block: int) -> None:
    assert mixed(seed, number, block) == compiled_mixed(seed, number, block)


@pytest.mark.parametrize("name", ["sieve", "s3fifo", "arc"])
def test_asking_for_the_order_changes_nothing(name: str) -> None:
    policy = EVICTION[name](PolicyContext(1, 8, 1, capacity=4, weights=(1,)))
    for event, block in enumerate([0, 1, 2, 3]):
        policy.observe(event, [block], [1])
        policy.admit(block)
    policy.observe(4, [0], [1])
    first = policy.order([0, 1, 2, 3, 7, 6], ())
    assert first[:2] == [6, 7]
    assert policy.order([0, 1, 2, 3, 6, 7], ()) == first
    assert [policy.key(block) for block in first] == [-1, -1, 0, 1, 2, 3]
    for block in first[2:]:
        policy.forget(block)
    assert [policy.key(block) for block in first] == [-1] * 6
    assert policy.order([], ()) == []


@pytest.mark.parametrize("name", ["belady", "belady-forced"])
def test_the_future_has_to_be_given(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be given the future routing, got none"):
        EVICTION[name](PolicyContext(1, 4, 1))
