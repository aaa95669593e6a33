"""The controller: golden traces, and the contract that every combination of policies keeps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import BEFORE
from sim.policies import EVICTION, PLACEMENT, PREFETCH, EvictionPolicy
from sim.replay.calibration import TraceCalibration
from sim.replay.feed import Feed
from sim.results import RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, host, misses_by_step, run, total_misses, trace_of, workloads
from traces.schema import NOT_ROUTED
from traces.workload import Workload, one_at_a_time, routings

PAIRS = [
    (evict, place) for evict in EVICTION for place in PLACEMENT if evict == "lru" or place in ("fetch", "hybrimoe")
]
"""Every eviction policy with a placement that uses the CPU and one that does not, and every placement with LRU."""

EVERY = pytest.mark.parametrize(("evict", "place"), PAIRS, ids=[" ".join(names) for names in PAIRS])
UNFITTED = [
    name for name, kind in EVICTION.items() if kind.needs <= {"future"} and kind.preload is EvictionPolicy.preload
]
FORCED = [name for name in UNFITTED if not EVICTION[name].bypass]


def columns(result: RunResult, *names: str) -> list[tuple[Any, ...]]:
    return [*zip(*(result.layers[name].tolist() for name in names), strict=True)]


# Golden cases.


def test_the_atomic_trace_of_the_literature() -> None:
    """Three equal layers of four experts, two slots each: 30 accesses, 12 hits, 18 misses."""
    unions = [[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]]
    result = run(trace_of([[union] * 3 for union in unions]), 2)
    assert result.layers["union"].sum() == 30
    assert result.layers["hits_union"].sum() == 12
    assert misses_by_step(result) == [[2, 2, 2], *[[1, 1, 1]] * 4]


def test_an_event_is_classified_before_anything_moves() -> None:
    """Expert by expert in the router's order, 2 would push 0 out before 0 is looked up: two misses at the last step."""
    result = run(trace_of([[[0]], [[1]], [[2, 0]]]), 2)
    assert misses_by_step(result) == [[1], [1], [1]]
    assert result.operations[["op", "expert"]].tail(4).to_numpy().tolist() == [
        ["evict", 1],
        ["copy", 2],
        ["gpu", 0],
        ["gpu", 2],
    ]


def test_a_union_above_the_capacity_streams_what_is_not_kept() -> None:
    """All keys are equal: the lowest id is not kept. The follower of a staging slot waits for its reader."""
    result = run(trace_of([[[0, 1, 2]], [[0, 1, 2]], [[0, 3]]]), 2, staging=1)
    assert columns(result, "hits_union", "misses", "bytes") == [(0, 3, 300), (2, 1, 100), (0, 2, 200)]
    rows = result.operations[["step", "op", "expert", "slot"]].to_numpy().tolist()
    assert rows == [
        [0, "copy", 1, 0],
        [0, "copy", 2, 1],
        [0, "copy", 0, 2],
        [0, "gpu", 1, 0],
        [0, "gpu", 2, 1],
        [0, "gpu", 0, 2],
        [1, "copy", 0, 2],
        [1, "gpu", 1, 0],
        [1, "gpu", 2, 1],
        [1, "gpu", 0, 2],
        [2, "evict", 1, 0],
        [2, "evict", 2, 1],
        [2, "copy", 0, 1],
        [2, "copy", 3, 0],
        [2, "gpu", 0, 1],
        [2, "gpu", 3, 0],
    ]


def test_streams_pass_through_the_staging_slots_in_turn() -> None:
    result = run(trace_of([[[0, 1, 2, 3]]], experts=5), 1, HandCosts(copy=2, gpu=1), staging=2)
    assert result.operations[["op", "expert", "slot"]].to_numpy().tolist() == [
        ["copy", 3, 0],
        ["copy", 0, 1],
        ["copy", 1, 2],
        ["gpu", 3, 0],
        ["gpu", 0, 1],
        ["copy", 2, 1],
        ["gpu", 1, 2],
        ["gpu", 2, 1],
    ]
    copies = result.events[result.events["resource"] == "link"]
    assert copies[["expert", "start_s", "end_s"]].to_numpy().tolist() == [[3, 1, 3], [0, 3, 5], [1, 5, 7], [2, 7, 9]]


def test_a_resident_of_the_event_may_leave_once_it_was_read() -> None:
    """Belady knows that 0 is not needed again: 0 is a hit, and its slot goes to 2 when it has been read."""
    trace = trace_of([[[0, 1]], [[0, 2]], [[1, 2]]])
    result = run(trace, 2, HandCosts(gpu=3, copy=2), evict="belady")
    assert misses_by_step(result) == [[2], [1], [0]]
    step = result.operations[result.operations["step"] == 1]
    assert step[["op", "expert", "slot"]].to_numpy().tolist() == [
        ["gpu", 0, 0],
        ["evict", 0, 0],
        ["copy", 2, 0],
        ["gpu", 2, 0],
    ]
    rows = result.events[(result.events["step"] == 1) & (result.events["expert"] >= 0)]
    starts = rows["start_s"].to_numpy() - rows["start_s"].min()
    assert rows["kind"].tolist() == ["expert", "copy", "expert"]
    assert starts.tolist() == [0, 3, 5]


def test_belady_passes_by_what_comes_later_than_all_residents() -> None:
    result = run(trace_of([[[0]], [[1]], [[2]], [[0]], [[1]], [[2]]]), 2, evict="belady")
    assert misses_by_step(result) == [[1], [1], [1], [0], [0], [1]]


def test_a_global_pool_is_shared_by_the_layers() -> None:
    trace = trace_of([[[0], [1, 2]], [[0], [1, 2]], [[3], [1, 2]]])
    assert misses_by_step(run(trace, 3, scope="global")) == [[1, 2], [0, 0], [1, 0]]
    # with 2 slots the layers push each other out; of layer 1's pair, equally old, the lower one leaves
    assert misses_by_step(run(trace, 2, scope="global")) == [[1, 2], [1, 1], [1, 1]]


def test_cpu_on_miss_fills_the_cache_and_then_leaves_it() -> None:
    result = run(trace_of([[[0, 1]], [[1, 2]], [[2, 3]]]), 2, HandCosts(cpu=5), place="cpu-on-miss")
    assert columns(result, "hits_union", "misses", "cpu_experts", "bytes") == [
        (0, 2, 0, 200),
        (1, 1, 1, 0),
        (0, 2, 2, 0),
    ]


def test_most_tokens_go_first() -> None:
    """A prompt of three tokens: expert 2 has three of them, 1 has two, 0 has one."""
    trace = trace_of([[[2, 1]], [[2, 1]], [[2, 0]]])
    trace.phase[:] = 0
    result = run(one_at_a_time(trace), 4)
    copies = result.operations[result.operations["op"] == "copy"]
    assert copies["expert"].tolist() == [2, 1, 0]
    kernels = result.operations[result.operations["op"] == "gpu"]
    assert kernels[["expert", "tokens"]].to_numpy().tolist() == [[2, 3], [1, 2], [0, 1]]
    assert columns(result, "assignments", "union") == [(6, 3)]


def test_a_prefetch_is_counted_as_what_it_was_when_the_layer_began() -> None:
    """Layer 1's expert is predicted by layer 0: it is late when its copy outlasts the dense part, else a hit."""
    trace = trace_of([[[0], [1]]], lookahead=[[[1], []]])
    for copy_s, answer in ((0.5, (1, 0, 0)), (8.0, (0, 1, 0))):
        costs = HandCosts(copy_sizes={EXPERT_BYTES: copy_s}, host=host(joins_layers=False))
        result = run(trace, 2, costs, prefetch="next-router")
        assert columns(result, "hits_union", "late_hits", "misses")[1] == answer
        assert result.layers["bytes"].tolist() == [EXPERT_BYTES, 0]
        kinds = result.events[result.events["resource"] == "link"][["kind", "layer", "expert"]]
        assert kinds.to_numpy().tolist() == [["copy", 0, 0], ["prefetch", 1, 1]]


def test_a_stale_prefetch_that_has_not_begun_leaves_its_slot() -> None:
    """Layer 0 predicts 1 and 2 for layer 1: when 3 is chosen, the link is still bringing 1."""
    trace = trace_of([[[0], [3]]], lookahead=[[[1, 2], []]])
    result = run(trace, 2, HandCosts(copy=8.0, host=host(joins_layers=False)), prefetch="next-router")
    assert columns(result, "late_hits", "misses") == [(0, 1), (0, 1)]
    copies = result.operations[result.operations["op"] == "copy"]
    assert copies[["layer", "expert"]].to_numpy().tolist() == [[0, 0], [1, 1], [1, 3]]
    assert copies["slot"].tolist()[1:] == [2, 3]  # both slots of layer 1 were free


@pytest.mark.parametrize(("place", "kept"), [("fetch", True), ("fiddler", False)])
def test_a_prefetch_that_was_chosen_is_decided_anew_where_the_cpu_may_compute_it(place: str, kept: bool) -> None:
    trace = trace_of([[[0], [2]]], lookahead=[[[1, 2], []]])
    costs = HandCosts(copy=8.0, host=host(joins_layers=False))
    result = run(trace, 2, costs, prefetch="next-router", place=place)
    assert columns(result, "late_hits", "misses", "cpu_experts")[1] == ((1, 0, 0) if kept else (0, 1, 1))
    ahead = result.events[result.events["kind"] == "prefetch"]["expert"].tolist()
    assert ahead == ([1, 2] if kept else [1])


def test_a_prefetch_pushes_out_neither_the_layer_at_hand_nor_what_is_predicted() -> None:
    trace = trace_of([[[0], [0]], [[1], [2]]], lookahead=[[[0], []], [[0, 2], []]])
    result = run(trace, 1, HandCosts(copy=0.25), prefetch="next-router")
    # one slot in layer 1, which holds the predicted 0: the prefetch of 2 finds no room
    assert columns(result, "hits_union", "misses") == [(0, 1), (1, 0), (0, 1), (0, 1)]


# The contract.


@st.composite
def runs(draw: st.DrawFn) -> tuple[Workload, int, HandCosts, dict[str, Any], int]:
    """A workload, slots, costs, and what of the system the policies under test do not say."""
    costs = HandCosts(
        copy=draw(st.sampled_from([0.2, 1.0, 7.0])),
        gpu=draw(st.sampled_from([0.3, 2.0])),
        cpu=draw(st.sampled_from([0.5, 3.0])),
        host=host(layer_s=draw(st.sampled_from([0.0, 0.4])), joins_layers=draw(st.booleans())),
    )
    system = {"prefetch": draw(st.sampled_from([*PREFETCH])), "synchronous": draw(st.booleans())}
    return draw(workloads()), draw(st.integers(1, 5)), costs, system, draw(st.integers(1, 3))


def check_counts(workload: Workload, result: RunResult) -> None:
    layers = result.layers
    expected = [(len(r.experts), r.assignments) for step in workload for r in routings(workload.trace, step)]
    assert columns(result, "union", "assignments") == expected
    assert (layers["hits_union"] + layers["late_hits"] + layers["misses"] == layers["union"]).all()
    assert (layers["cpu_experts"] <= layers["union"]).all()
    assert (layers["hits_assignments"] <= layers["assignments"]).all()
    assert (layers["hits_assignments"] >= layers["hits_union"]).all()
    assert (layers["bytes"] <= layers["misses"] * EXPERT_BYTES).all()
    assert (layers["bytes"] >= (layers["misses"] - layers["cpu_experts"]) * EXPERT_BYTES).all()
    operations = result.operations
    assert (operations["op"] == "cpu").sum() == layers["cpu_experts"].sum()
    copies = operations[operations["op"] == "copy"]
    assert (copies["bytes"] == EXPERT_BYTES).all()
    prefetched = (result.events["kind"] == "prefetch").sum()
    assert copies["bytes"][copies["step"] != BEFORE].sum() == layers["bytes"].sum() + prefetched * EXPERT_BYTES
    work = operations[operations["op"].isin(["gpu", "cpu"])]
    assert len(work) == layers["union"].sum()
    assert work["tokens"].sum() == layers["assignments"].sum()


def check_slots(result: RunResult, capacity: int, pools: int, staging: int) -> None:
    """Replays the log against a model of the slots: what a slot holds, and whether it may be written."""
    held: dict[int, tuple[int, int]] = {}
    last = pools * capacity
    unread: set[int] = set()
    for row in result.operations.itertuples(index=False):
        block = (row.layer, row.expert)
        if row.op == "copy":
            assert 0 <= row.slot < last + staging
            assert row.slot not in unread, "a staging slot is overwritten before it was read"
            assert row.slot >= last or row.slot not in held, "a slot would hold two blocks"
            if pools > 1 and row.slot < last:
                assert row.slot // capacity == row.layer
            assert row.slot >= last or block not in [held[slot] for slot in held if slot < last]
            held[row.slot] = block
            if row.slot >= last:
                unread.add(row.slot)
        elif row.op == "evict":
            assert held.pop(row.slot) == block
        elif row.op == "gpu":
            assert held[row.slot] == block
            unread.discard(row.slot)
        else:
            assert (row.op, row.slot) == ("cpu", -1)
        assert sum(slot < last for slot in held) <= pools * capacity
    assert unread == set()


def check_times(result: RunResult) -> None:
    """In time as well: a kernel runs after the copy that brought its expert, a copy after its slot's last read."""
    keys = ["step", "layer", "expert"]
    events = result.events[result.events["expert"] >= 0]
    copies = defaultdict[tuple[int, ...], list[tuple[float, float]]](list)  # an expert may be streamed, then prefetched
    moved = events[events["kind"].isin(["copy", "prefetch"])].sort_values("start_s", kind="stable")
    for *where, start_s, end_s in moved[[*keys, "start_s", "end_s"]].itertuples(index=False):
        copies[*where].append((start_s, end_s))
    kernels = {
        tuple(where): (start_s, end_s)
        for *where, start_s, end_s in events.loc[events["resource"] == "gpu", [*keys, "start_s", "end_s"]].itertuples(
            index=False
        )
    }
    arrived: dict[int, float] = {}
    read: dict[int, float] = {}
    for row in result.operations.itertuples(index=False):
        where = (row.step, row.layer, row.expert)
        if row.step == BEFORE:
            arrived[row.slot] = 0.0
        elif row.op == "copy":
            free_s = read.get(row.slot, 0.0) - 1e-9
            mine = next((times for times in copies[where] if times[0] >= free_s), None)
            assert mine is not None, "a copy begins before its slot was last read"
            copies[where].remove(mine)  # of an expert that is streamed and prefetched, the one that may be this
            arrived[row.slot] = mine[1]
        elif row.op == "gpu":
            start_s, end_s = kernels[where]
            assert start_s >= arrived[row.slot] - 1e-9
            read[row.slot] = end_s


def run_any(workload: Workload, slots: int, costs: HandCosts, staging: int, **system: Any) -> RunResult:
    """A run of any system: its fitted policies learn from the very trace, and scores come from equal gates."""
    trace = workload.trace
    gates = np.where(trace.expert_ids == NOT_ROUTED, 0.0, 1.0 / trace.header.top_k).astype(np.float16)
    workload = replace(workload, trace=replace(trace, gates=gates))
    spec = SystemSpec(**system)
    fit = TraceCalibration(Feed.of(trace, 1)) if "calibration" in spec.needs else None
    return simulate(workload, spec, Budget(slots=slots, staging=staging), costs, hardware="by hand", calibration=fit)


@EVERY
@settings(max_examples=25)
@given(runs(), st.sampled_from(["layer", "global"]))
def test_the_contract(
    evict: str, place: str, case: tuple[Workload, int, HandCosts, dict[str, Any], int], scope: str
) -> None:
    workload, slots, costs, system, staging = case
    result = run_any(workload, slots, costs, staging, evict=evict, place=place, scope=scope, **system)
    pools = 1 if scope == "global" else workload.trace.header.layers
    check_counts(workload, result)
    check_slots(result, slots, pools, staging)
    check_times(result)


@settings(max_examples=60)
@given(workloads(), st.integers(1, 8), st.sampled_from(["layer", "global"]))
def test_nobody_misses_less_than_belady(workload: Workload, slots: int, scope: str) -> None:
    misses = {evict: total_misses(run(workload, slots, evict=evict, scope=scope)) for evict in ("lru", "lfu", "belady")}
    assert misses["belady"] == min(misses.values())


@settings(max_examples=60)
@given(workloads(), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["layer", "global"]))
def test_a_larger_lru_hits_whenever_a_smaller_one_did(workload: Workload, slots: int, more: int, scope: str) -> None:
    small, large = (run(workload, size, scope=scope).layers for size in (slots, slots + more))
    assert (large["hits_union"] >= small["hits_union"]).all()
    assert (large["hits_assignments"] >= small["hits_assignments"]).all()


@settings(max_examples=40)
@given(workloads(), st.sampled_from(UNFITTED), st.sampled_from(["layer", "global"]))
def test_a_cache_that_holds_everything_misses_once(workload: Workload, evict: str, scope: str) -> None:
    header = workload.trace.header
    slots = header.experts * (header.layers if scope == "global" else 1)
    used = {
        (layer, expert)
        for step in workload
        for layer, routing in enumerate(routings(workload.trace, step))
        for expert in routing.experts
    }
    result = run(workload, slots, evict=evict, scope=scope)
    assert total_misses(result) == len(used)
    assert "evict" not in set(result.operations["op"])


@settings(max_examples=60)
@given(
    workloads(batch=1, most_k=1, prompts=False),
    st.integers(1, 4),
    st.sampled_from(["lru", "lfu", "belady"]),
    st.randoms(),
)
def test_the_names_of_experts_do_not_matter_where_nothing_ties(
    workload: Workload, slots: int, evict: str, random: Any
) -> None:
    """One expert an event: no two blocks have the same last use, so that no tie is ever broken by a number."""
    trace, experts = workload.trace, workload.trace.header.experts
    renamed = [*range(experts)]
    random.shuffle(renamed)
    before = run(workload, slots, evict=evict).layers
    ids = trace.expert_ids
    trace.expert_ids[:] = np.where(ids == NOT_ROUTED, ids, np.array([*renamed, 0])[np.minimum(ids, experts)])
    after = run(workload, slots, evict=evict).layers
    pd.testing.assert_series_equal(before["misses"], after["misses"])


@settings(max_examples=60)
@given(workloads(), st.integers(1, 5), st.sampled_from(UNFITTED), st.sampled_from([*PLACEMENT]))
def test_decisions_do_not_depend_on_the_clock_without_prefetch(
    workload: Workload, slots: int, evict: str, place: str
) -> None:
    slow = host(layer_s=0.3, readback_s=0.2, operation_s=0.1)
    logs = [
        run(workload, slots, costs, evict=evict, place=place, synchronous=synchronous).operations
        for costs, synchronous in (
            (HandCosts(), False),
            (HandCosts(dense=9, head=0.1, host=slow), False),
            (HandCosts(), True),
        )
    ]
    pd.testing.assert_frame_equal(logs[0], logs[1])
    pd.testing.assert_frame_equal(logs[0], logs[2])


@settings(max_examples=30)
@given(workloads(), st.integers(1, 5), st.sampled_from(["fetch", "cpu-on-miss", "static"]))
def test_placements_that_weigh_nothing_do_not_depend_on_costs(workload: Workload, slots: int, place: str) -> None:
    logs = [run(workload, slots, costs, place=place).operations for costs in (HandCosts(), HandCosts(copy=9, gpu=0.1))]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.parametrize("evict", FORCED)
def test_a_forced_policy_keeps_the_experts_of_the_event(evict: str) -> None:
    result = run(trace_of([[[0, 1]], [[2, 3]], [[2, 3]]]), 2, evict=evict)
    assert misses_by_step(result) == [[2], [2], [0]]
