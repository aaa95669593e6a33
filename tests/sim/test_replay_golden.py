"""Replays worked out by hand, and the table of misses on the recorded traces that ship.

``python -m tests.sim.golden_misses`` writes the table anew.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sim.policies import EVICTION
from sim.policies.base import EvictionPolicy
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.run import replay
from tests.sim import golden_misses
from tests.sim.hand import trace_of
from tests.sim.replaying import recount
from traces.errors import InputError
from traces.schema import Trace, TraceHeader

L, S = 0, 1
"""Kinds of entries in the log: left, and streamed: used without being kept."""

BOTH_WAYS = pytest.mark.parametrize("by_object", [True, False], ids=["object", "compiled"])


def slots(amount: int) -> Capacity:
    return Capacity(amount, "slots", str(amount))


def play(
    trace: Trace, capacity: Capacity, by_object: bool, *, policy: str = "lru", batch: int = 1, **way: Any
) -> Replay:
    settings = Settings(policy, capacity, **way)
    return replay(Feed.of(trace, batch), settings, by_object=by_object, log=True)


def misses_of(outcome: Replay) -> list[int]:
    """Misses of every event, in order."""
    return [*recount(outcome).misses.values()]


def some(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


KINDS = ("compulsory_misses", "capacity_misses", "collision_misses")


# By hand.


@BOTH_WAYS
@pytest.mark.parametrize("contract", ["atomic", "serial"])
def test_the_toy_trace_of_the_literature(contract: str, by_object: bool) -> None:
    """arXiv 2608.07911: three equal layers of four experts, two slots each: 30 accesses, 12 hits, 18 misses."""
    unions = [[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]]
    outcome = play(trace_of([[union] * 3 for union in unions]), slots(2), by_object, contract=contract)
    assert some(outcome.row(), "union_accesses", "hits_union", "misses_union", *KINDS) == (30, 12, 18, 12, 6, 0)
    assert misses_of(outcome) == [2, 2, 2] + [1, 1, 1] * 4
    assert outcome.row()["misses_a_step_max"] == 6
    assert outcome.row()["misses_a_step_p50"] == 3


@BOTH_WAYS
@pytest.mark.parametrize(
    ("contract", "order", "missed", "kinds", "log"),
    [
        # cache 0 1; all of 2 0 is looked up, then 1 goes, which was not used
        ("atomic", "as-routed", [1, 1, 1], (3, 0, 0), [(2, 1, L)]),
        # 2 pushes out 0, the oldest; 0 is wanted next, and pushes out 1
        ("serial", "as-routed", [1, 1, 2], (3, 0, 1), [(2, 0, L), (3, 1, L)]),
        # 0 hits first, so that 1 is the oldest when 2 comes
        ("serial", "ascending", [1, 1, 1], (3, 0, 0), [(3, 1, L)]),
    ],
)
def test_where_the_contracts_differ(
    contract: str, order: str, missed: list[int], kinds: Any, log: Any, by_object: bool
) -> None:
    trace = trace_of([[[0]], [[1]], [[2, 0]]])
    outcome = play(trace, slots(2), by_object, contract=contract, order=order)
    assert misses_of(outcome) == missed
    assert some(outcome.row(), *KINDS) == kinds
    assert outcome.log.tolist() == [[*entry] for entry in log]
    assert outcome.row()["order"] == ("at-once" if contract == "atomic" else order)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("policy", "contract", "missed", "kinds", "log"),
    [
        # all were used at once: the lowest passes by, twice; then 1 and 2 go for 0 and 3
        ("lru", "atomic", [3, 1, 2], (4, 2, 0), [(0, 0, S), (1, 0, S), (2, 1, L), (2, 2, L)]),
        # each pushes out the one that comes next
        (
            "lru",
            "serial",
            [3, 3, 2],
            (4, 2, 2),
            [(2, 0, L), (3, 1, L), (4, 2, L), (5, 0, L), (6, 1, L), (7, 2, L)],
        ),
        # all come again at once: the lowest passes by; then 0 alone comes again: of 1 and 2 the lower goes; then
        # nothing comes again: the oldest goes
        ("belady", "atomic", [3, 1, 1], (4, 1, 0), [(0, 0, S), (1, 1, L), (2, 2, L)]),
        # 0 comes first again, then 1, then 2, which passes by; at the second pass 1 never comes again, and goes for 2,
        # which never comes again either, but was used later; so does 3 for 2
        ("belady", "serial", [3, 1, 1], (4, 1, 0), [(2, 2, S), (5, 1, L), (7, 2, L)]),
    ],
)
def test_a_union_above_the_capacity(
    policy: str, contract: str, missed: list[int], kinds: Any, log: Any, by_object: bool
) -> None:
    trace = trace_of([[[0, 1, 2]], [[0, 1, 2]], [[0, 3]]])
    outcome = play(trace, slots(2), by_object, policy=policy, contract=contract)
    assert outcome.log.tolist() == [[*entry] for entry in log]
    assert misses_of(outcome) == missed
    row = outcome.row()
    assert some(row, *KINDS) == kinds
    assert row["regime_mean"] == pytest.approx((3 + 3 + 2) / 3 / 2)
    assert row["regime_above_one"] == pytest.approx(2 / 3)


@BOTH_WAYS
def test_unequal_bytes_in_one_pool(by_object: bool) -> None:
    """Layer 0 has experts of 100 bytes (blocks 0 to 3), layer 1 of 300 (4 to 7); the pool holds 500 bytes.

    Event 3 wants 300 bytes, and 0 is the oldest, then 4: 0 goes, which is not enough, then 4. That 0 would fit beside
    1 and 5 does not matter: what comes after the first that does not fit goes. Event 7 wants 4 and 5, which are 600
    bytes: first go 0 and 1, which it does not use, then 4, the lower of two that were used at once, though it hit.
    """
    trace = sized(trace_of([[[0], [0]], [[1], [1]], [[0, 1], [0]], [[], [0, 1]]]), (100, 300))
    outcome = play(trace, Capacity(500, "bytes", "500B"), by_object, scope="global")
    assert outcome.log.tolist() == [[3, 0, L], [3, 4, L], [5, 5, L], [7, 0, L], [7, 1, L], [7, 4, L]]
    assert misses_of(outcome) == [1, 1, 1, 1, 1, 1, 1]
    row = outcome.row()
    assert some(row, "hits_union", "evictions", "bytes_loaded", *KINDS) == (2, 6, 3 * 100 + 4 * 300, 4, 3, 0)
    assert some(row, "capacity_bytes", "capacity_slots") == (500, None)


def sized(trace: Trace, sizes: tuple[int, ...]) -> Trace:
    """The same routing with experts of other ``sizes``, by layer."""
    return Trace.of(trace.header.model_copy(update={"expert_bytes": sizes}), **dict(trace.arrays()))


def two_requests() -> Trace:
    """One layer. Sequence 0: a prompt of 0 and 0, then 1. Sequence 1: a prompt of 2, then 0."""
    header = TraceHeader(model="by hand", layers=1, experts=4, top_k=1, expert_bytes=(100,))
    return Trace.of(
        header,
        expert_ids=np.array([0, 0, 1, 2, 0]).reshape(5, 1, 1),
        token_ids=np.zeros(5),
        sequence=[0, 0, 0, 1, 1],
        position=[0, 1, 2, 0, 1],
        step=[0, 0, 1, 2, 3],
        phase=[0, 0, 1, 0, 1],
    )


@BOTH_WAYS
def test_lanes_share_what_they_load(by_object: bool) -> None:
    """Pass 0: 0 twice and 2; pass 1: 1 and 0, which hits; 2 goes for 1."""
    outcome = play(two_requests(), slots(2), by_object, batch=2)
    prefill, decode = outcome.row("prefill"), outcome.row("decode")
    names = ("assignments", "union_accesses", "hits_assignments", "hits_union", "bytes_loaded")
    assert some(prefill, *names) == (3, 2, 0, 0, 200)
    assert some(decode, *names) == (2, 2, 1, 1, 100)
    assert outcome.log.tolist() == [[1, 2, L]]
    assert some(decode, "batch", "hit_ratio_union", "misses_a_step_max") == (2, 0.5, 1)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("sequences", "compulsory", "evictions", "log"),
    [
        ("carry", [2, 1], [0, 2], [[2, 0, L], [3, 1, L]]),  # 2 pushes out 0, which comes next and pushes out 1
        ("fresh", [2, 2], [0, 0], []),
    ],
)
def test_a_cache_is_carried_to_the_next_request_or_emptied(
    sequences: str, compulsory: list[int], evictions: list[int], log: list[list[int]], by_object: bool
) -> None:
    outcome = play(two_requests(), slots(2), by_object, sequences=sequences)
    groups = outcome.groups()
    assert groups["accesses"].tolist() == [2, 2]
    assert groups["hits"].tolist() == [0, 0]
    assert groups["compulsory"].tolist() == compulsory
    assert groups["evictions"].tolist() == evictions
    assert outcome.groups("prefill")["assignments"].tolist() == [2, 1]
    assert outcome.log.tolist() == log


@BOTH_WAYS
def test_passes_of_the_warm_up_are_not_counted(by_object: bool) -> None:
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 1]]])
    outcome = replay(Feed.of(trace, warmup_steps=1), Settings("lru", slots(2)), by_object=by_object, log=True)
    row = outcome.row()
    assert some(row, "warmup_steps", "union_accesses", "hits_union", "misses_union") == (1, 4, 2, 2)
    assert some(row, *KINDS) == (1, 1, 0)
    assert some(row, "misses_a_step_p50", "misses_a_step_max") == (1, 1)


# How a trace is cut.


def test_a_feed_is_cut_where_the_row_of_the_table_changes() -> None:
    """Passes: prompt and token of the first request, prompt and token of the second; one warms up."""
    feed = Feed.of(two_requests(), warmup_steps=1)
    assert feed.runs.tolist() == [0, 1, 2, 3, 4]
    assert feed.bins.tolist() == [4, 1, 2, 3]
    assert feed.starts.tolist() == [1, 0, 1, 0]
    assert feed.assignments == 5
    assert (feed.single, Feed.of(trace_of([[[0]], [[1]]])).single) == (False, True)


@BOTH_WAYS
@pytest.mark.parametrize("sequences", ["carry", "fresh"])
def test_where_a_feed_is_cut_does_not_matter(sequences: str, by_object: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("lru", slots(2), sequences=sequences)  # type: ignore[arg-type]
    trace = two_requests()
    whole = replay(Feed.of(trace), settings, by_object=by_object, log=True)
    monkeypatch.setattr("sim.replay.feed.MOST_PASSES", 1)
    told: list[int] = []
    pieces = replay(Feed.of(trace), settings, by_object=by_object, log=True, progress=told.append)
    assert told == [1, 1, 1, 1]
    assert (pieces.table == whole.table).all()
    assert pieces.log.tolist() == whole.log.tolist()


# What is refused.


def test_a_warm_up_must_leave_a_pass() -> None:
    trace = trace_of([[[0]], [[1]]])
    for passes in (-1, 2):
        with pytest.raises(InputError, match=f"warmup must be between 0 and 1 of 2 passes, got {passes}"):
            Feed.of(trace, warmup_steps=passes)


def test_a_phase_that_is_not_there_is_refused() -> None:
    outcome = play(trace_of([[[0]]]), slots(1), False)
    with pytest.raises(InputError, match="phase must be one that the trace has, got prefill"):
        outcome.row("prefill")
    with pytest.raises(InputError, match="phase must be one of all, prefill, decode, got 'both'"):
        outcome.row("both")


def test_an_unknown_policy_is_refused_with_its_neighbours() -> None:
    with pytest.raises(InputError, match=r"policy must be a known name, got 'lfru2?x' \(did you mean .*lfr?u"):
        play(trace_of([[[0]]]), slots(1), False, policy="lfrux")


@pytest.mark.parametrize("need", ["scores", "calibration"])
def test_a_policy_without_what_it_needs_is_refused(need: str) -> None:
    class Needy(EvictionPolicy):
        name = "needy"
        needs = frozenset({need})

        def key(self, block: int) -> float:
            return 0.0

    feed, settings = Feed.of(trace_of([[[0]]])), Settings("needy", slots(1))
    rule = {"scores": "trace must have the router's scores", "calibration": "needy must be given a calibration trace"}
    with pytest.raises(InputError, match=rule[need]):
        replay(feed, settings, policy=Needy)


# The recorded traces.


@pytest.mark.parametrize("name", golden_misses.POLICIES)
def test_the_misses_on_the_recorded_traces(name: str) -> None:
    """Three recordings, both contracts and scopes, a quarter and a half of the experts."""
    golden = json.loads(golden_misses.FILE.read_text(encoding="utf-8"))
    assert golden_misses.table(name) == golden[name]


def test_the_table_has_no_policy_that_is_gone() -> None:
    golden = json.loads(golden_misses.FILE.read_text(encoding="utf-8"))
    assert [*golden] == sorted(name for name, kind in EVICTION.items() if "calibration" not in kind.needs)
