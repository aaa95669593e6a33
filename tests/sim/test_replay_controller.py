"""The controller and the replay ask a policy the same questions: the same misses, and every hook as documented."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sim.policies import EVICTION, PolicyContext
from sim.policies.base import EvictionPolicy
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from tests.sim import golden_misses
from tests.sim.hand import HandCosts, run, trace_of
from tests.sim.replaying import play, recount, traces
from traces.schema import NOT_ROUTED, Trace, TraceHeader
from traces.workload import Workload, lock_step

ALONE = [name for name, kind in EVICTION.items() if "calibration" not in kind.needs]
"""Policies that need nothing but the trace."""

SCOPE = pytest.mark.parametrize("scope", ["layer", "global"])


def misses_of_run(workload: Workload, slots: int, name: str, scope: str) -> dict[tuple[int, int], int]:
    """misses[step, layer] of a simulated run, demand only."""
    layers = run(workload, slots, evict=name, scope=scope).layers
    columns = (layers[column].tolist() for column in ("step", "layer", "misses"))
    return {(step, layer): misses for step, layer, misses in zip(*columns, strict=True) if misses}


def misses_of_replay(feed: Feed, slots: int, name: str, scope: Any) -> dict[tuple[int, int], int]:
    """The same of a replay."""
    way = Settings(name, Capacity(slots, "slots", str(slots)), scope=scope)
    return {event: misses for event, misses in recount(play(feed, way)).misses.items() if misses}


@pytest.mark.parametrize("name", ALONE)
@SCOPE
@settings(max_examples=10)
@given(data=st.data())
def test_a_run_misses_what_the_replay_misses(name: str, scope: str, data: Any) -> None:
    """Event by event, whatever the batch; the passes of both are the same where a prompt is one pass."""
    trace, batch = data.draw(traces(unequal=False)), data.draw(st.integers(1, 3))
    assume((trace.expert_ids != NOT_ROUTED).any())
    trace = whole_prompts(trace)
    header = trace.header
    slots = data.draw(st.integers(1, header.experts * (header.layers if scope == "global" else 1)))
    expected = misses_of_replay(Feed.of(trace, batch), slots, name, scope)
    assert misses_of_run(lock_step(trace, batch), slots, name, scope) == expected


@pytest.mark.parametrize("name", ALONE)
def test_a_layer_without_a_routed_expert_is_no_event(name: str) -> None:
    """Two layers of two experts, three slots for both; in the fifth token nothing is routed to the first layer."""
    chosen = [[1, 1], [1, NOT_ROUTED], [0, 0], [1, 1], [NOT_ROUTED, 0], [0, NOT_ROUTED], [0, 0]]
    ids = np.array(chosen, np.uint16)[:, :, None]
    score = np.where(ids == np.arange(2), 0.6665, 0.3333).astype(np.float16)
    header = TraceHeader(model="by hand", layers=2, experts=2, top_k=1, expert_bytes=(100, 100))
    order = np.arange(7)
    rows = {"token_ids": 0 * order, "sequence": 0 * order, "position": order, "step": order, "phase": 0 * order + 1}
    trace = Trace.of(header, expert_ids=ids, scores=score, **rows)
    expected = misses_of_replay(Feed.of(trace, 1), 3, name, "global")
    assert misses_of_run(lock_step(trace, 1), 3, name, "global") == expected


def whole_prompts(trace: Trace) -> Trace:
    """The same tokens, a prompt in one pass and each token after it in one of its own."""
    step, number = [], -1
    previous: tuple[int, int] | None = None
    for sequence, phase in zip(trace.sequence.tolist(), trace.phase.tolist(), strict=True):
        number += phase == 1 or (sequence, phase) != previous
        previous = sequence, phase
        step.append(number)
    return Trace.of(trace.header, **{**dict(trace.arrays()), "step": step})


@pytest.mark.parametrize("name", ALONE)
def test_a_run_of_a_recorded_trace_misses_what_the_replay_misses(name: str) -> None:
    """The first requests of the batched recording."""
    whole = golden_misses.feed("batch4").trace
    rows = whole.sequence < 4
    trace = Trace.of(whole.header, **{field: array[rows] for field, array in whole.arrays()})
    workload = lock_step(trace, 4)
    assert misses_of_run(workload, 8, name, "layer") == misses_of_replay(Feed.of(trace, 4), 8, name, "layer")


# The hooks, one by one.


class Spy(EvictionPolicy):
    """The least recently used leaves; writes down what it is told."""

    name: ClassVar[str] = "spy"
    heard: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._last = [-1] * context.blocks

    def begin_sequence(self) -> None:
        self.heard.append(("begin",))

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self.heard.append(("observe", event, [*blocks], [*counts]))
        for block in blocks:
            self._last[block] = event

    def key(self, block: int) -> float:
        return self._last[block]

    def admit(self, block: int) -> None:
        self.heard.append(("admit", block))

    def forget(self, block: int) -> None:
        self.heard.append(("forget", block))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a spy hears that is registered while the test runs."""
    monkeypatch.setitem(EVICTION, Spy.name, Spy)
    monkeypatch.setattr(Spy, "heard", [])
    return Spy.heard


CROWDED = [[[0, 1, 2]], [[1, 3]], [[3]]]
"""Two slots: 0, the lowest of three used at once, is not kept; then 2 leaves for 3; then 3 hits."""

TOLD_AT_ONCE = [
    ("begin",),
    ("observe", 0, [0, 1, 2], [1, 1, 1]),
    ("forget", 0),
    ("admit", 1),
    ("admit", 2),
    ("observe", 1, [1, 3], [1, 1]),
    ("forget", 2),
    ("admit", 3),
    ("observe", 2, [3], [1]),
]

TOLD_IN_TURN = [
    ("begin",),
    ("observe", 0, [0], [1]),
    ("admit", 0),
    ("observe", 0, [1], [1]),
    ("admit", 1),
    ("observe", 0, [2], [1]),
    ("forget", 0),
    ("admit", 2),
    ("observe", 1, [1], [1]),
    ("observe", 1, [3], [1]),
    ("forget", 2),
    ("admit", 3),
    ("observe", 2, [3], [1]),
]


def test_the_replay_tells_the_policy_what_becomes_of_every_block(heard: list[tuple[Any, ...]]) -> None:
    for contract, told in (("atomic", TOLD_AT_ONCE), ("serial", TOLD_IN_TURN)):
        heard.clear()
        replay(Feed.of(trace_of(CROWDED)), Settings("spy", Capacity(2, "slots", "2"), contract=contract))  # type: ignore[arg-type]
        assert heard == told


def test_the_controller_tells_the_policy_the_same(heard: list[tuple[Any, ...]]) -> None:
    run(trace_of(CROWDED), 2, evict="spy")
    assert heard == TOLD_AT_ONCE


def test_the_controller_tells_of_what_the_cpu_computes_and_what_is_prefetched(heard: list[tuple[Any, ...]]) -> None:
    """One slot a layer. Layer 1: 0 is fetched, 1 is computed on the CPU, and prefetched for the third pass."""
    trace = trace_of([[[0], [0]], [[0], [1]], [[0], [1]]], lookahead=[[[], []], [[], []], [[1], []]])
    run(trace, 1, HandCosts(copy=0.25), evict="spy", place="cpu-on-miss", prefetch="next-router")
    told = [entry for entry in heard if entry[0] != "observe"]
    zero, one = 4, 5
    assert told == [("begin",), ("admit", 0), ("admit", zero), ("forget", one), ("forget", zero), ("admit", one)]


@pytest.mark.parametrize(("batch", "begins"), [(1, [0, 2, 4]), (2, [0, 2])])
def test_a_batch_of_requests_begins_as_one(batch: int, begins: list[int], heard: list[tuple[Any, ...]]) -> None:
    """Three requests of two tokens each, one layer: the passes before which a request, or a batch of them, begins."""
    trace = trace_of([[[0]], [[1]], [[2]], [[3]], [[0]], [[1]]])
    arrays = dict(trace.arrays()) | {"sequence": [0, 0, 1, 1, 2, 2], "position": [0, 1, 0, 1, 0, 1]}
    trace = Trace.of(trace.header, **arrays)
    run(lock_step(trace, batch), 2, evict="spy")
    assert begun(heard) == begins
    heard.clear()
    replay(Feed.of(trace, batch), Settings("spy", Capacity(2, "slots", "2")))
    assert begun(heard) == begins
    heard.clear()
    replay(Feed.of(trace, batch), Settings("spy", Capacity(2, "slots", "2"), sequences="fresh"))
    assert begun(heard) == begins


def begun(heard: list[tuple[Any, ...]]) -> list[int]:
    """The events that come first after a request has begun."""
    return [after[1] for entry, after in pairwise(heard) if entry == ("begin",)]
