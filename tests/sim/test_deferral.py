"""KTransformers' deferral of CPU experts to the next layer: times by hand, who is deferred, and what refuses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.bounds import bounds_of
from sim.controller import OffloadController
from sim.needs import check_needs
from sim.plan import CPU, Operation
from sim.run import build_controller, routings_of, simulate
from sim.systems import Budget, SystemSpec
from tests.sim.hand import HandCosts, Script, cpu, gpu, host, play, prefetch, run, trace_of, workloads
from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.workload import Workload, best_ranks, one_at_a_time

BOTH_WAYS = pytest.mark.parametrize("closed", [True, False], ids=["closed form", "events"])
FIRST = [cpu(1, 0), cpu(2, 1, deferred=True), gpu(3, 2)]
WAYS = {"closed form": {}, "copy by copy": {1: [prefetch(9, 3, 2)]}}
"""What is copied ahead decides which of the closed forms runs."""


def system(defer: int, **fields: Any) -> SystemSpec:
    options = {"place": {"defer": defer}}
    return SystemSpec(**{"evict": "static-uniform", "place": "static", "options": options, **fields})


@BOTH_WAYS
@pytest.mark.parametrize("transfers", WAYS.values(), ids=WAYS)
def test_a_deferred_expert_holds_up_the_next_layer(closed: bool, transfers: dict[int, Any]) -> None:
    layers = [FIRST, [gpu(4, 1, layer=1)], [gpu(5, 0, layer=2)]]
    times = play(Script(layers, {**transfers}), HandCosts(cpu=4), closed=closed)
    assert times["cpu", "expert", 0, 0] == (1, 5)
    assert times["cpu", "expert", 0, 1] == (5, 9)
    assert times["gpu", "dense", 1, -1] == (5, 6)  # not at 9
    assert times["gpu", "expert", 1, 1] == (6, 7)
    assert times["gpu", "dense", 2, -1] == (9, 10)  # not at 7


@BOTH_WAYS
@pytest.mark.parametrize("transfers", WAYS.values(), ids=WAYS)
def test_the_next_layers_experts_queue_behind_what_was_deferred(closed: bool, transfers: dict[int, Any]) -> None:
    layers = [FIRST, [cpu(4, 0, layer=1), cpu(5, 1, layer=1, deferred=True)], [gpu(6, 0, layer=2)]]
    times = play(Script(layers, {**transfers}), HandCosts(cpu=4), closed=closed)
    assert times["cpu", "expert", 1, 0] == (9, 13)
    assert times["gpu", "dense", 2, -1] == (13, 14)
    assert times["cpu", "expert", 1, 1] == (13, 17)
    assert times["gpu", "head", 3, -1] == (17, 18)


@BOTH_WAYS
def test_a_joining_host_does_not_wait_for_what_was_deferred(closed: bool) -> None:
    costs = HandCosts(cpu=4, host=host(joins_layers=True, join_s=0.5))
    times = play(Script([FIRST, [gpu(4, 1, layer=1)]]), costs, closed=closed)
    assert times["gpu", "dense", 1, -1] == (5.5, 6.5)
    assert times["gpu", "head", 2, -1] == (9.5, 10.5)


@BOTH_WAYS
def test_one_at_a_time_nothing_is_deferred(closed: bool) -> None:
    times = play(Script([FIRST, [gpu(4, 1, layer=1)]], synchronous=True), HandCosts(cpu=4), closed=closed)
    assert times["cpu", "expert", 0, 1] == (5, 9)
    assert times["gpu", "expert", 0, 2] == (9, 10)
    assert times["gpu", "dense", 1, -1] == (10, 11)


def test_the_layer_ends_without_it_and_the_next_one_with_it() -> None:
    trace = gated([[[0, 1]] * 3], [[[0.9, 0.1]] * 3])
    costs = HandCosts(cpu=4)
    plan = one_at_a_time(trace)
    layers = simulate(plan, system(1, evict="lru"), Budget(slots=1), costs, hardware="by hand").layers
    # the CPU computes both experts of each layer, one of them beside the next layer's dense part
    assert layers["end_s"].tolist() == [5, 13, 25]
    assert layers["cpu_experts_s"].tolist() == [8, 8, 8]


def gated(chosen: list[Any], gates: list[Any], **header: Any) -> Trace:
    trace = trace_of(chosen)
    return Trace.of(trace.header, **{**dict(trace.arrays()), "gates": np.array(gates)})


def planned(trace: Trace, spec: SystemSpec) -> list[list[Operation]]:
    """Operations by layer of the first pass."""
    workload = one_at_a_time(trace)
    controller: OffloadController = build_controller(workload, spec, Budget(slots=1), HandCosts())
    controller.preload()
    controller.begin_step(0)
    routing = routings_of(trace, ranked="gates" in spec.needs)(workload.steps[0])
    return [controller.plan_layer(layer, one).operations for layer, one in enumerate(routing)]


def test_the_lowest_gates_on_the_cpu_are_deferred_but_in_the_last_layer() -> None:
    trace = gated([[[0, 1, 2, 3]] * 3], [[[0.2, 0.3, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]])
    layers = planned(trace, system(2))  # the GPU has expert 0, 1, 3 of the three layers
    cpu_ops = [[(one.expert, one.deferred) for one in operations if one.op == CPU] for operations in layers]
    assert cpu_ops == [
        [(1, False), (3, False), (2, True)],
        [(2, False), (3, False), (0, True)],
        [(0, False), (1, False), (2, False)],
    ]
    assert not any(one.deferred for operations in planned(trace, system(0)) for one in operations)


def test_an_expert_of_several_tokens_ranks_as_its_best_one_does() -> None:
    trace = gated([[[0, 1, 2]], [[2, 1]]], [[[0.5, 0.3, 0.2]], [[0.1, 0.1, 0.0]]])
    prompt = replace(trace, phase=trace.phase * 0 + int(Phase.PREFILL), step=trace.step * 0)
    assert best_ranks(prompt, np.arange(2)).tolist() == [[0, 0, 1, 3]]  # of equal gates the lower expert comes first
    assert best_ranks(prompt, np.arange(1)).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="gates must be there"):
        best_ranks(trace_of([[[0]]]), np.arange(1))


def test_a_run_says_that_its_outputs_are_others() -> None:
    trace = gated([[[0, 1]] * 2], [[[0.9, 0.1]] * 2])
    notes = run(trace, 1, evict="lru", place="static", options={"place": {"defer": 1}}).info.notes
    assert any(note.startswith("deferral changes the model's outputs: ") for note in notes)
    assert not any("deferral" in note for note in run(trace, 1, evict="lru", place="static").info.notes)


def test_what_cannot_be_deferred_is_refused() -> None:
    with pytest.raises(InputError, match=r"^trace must have gates for defer 1 of static, got none$"):
        check_needs(trace_of([[[0]]]), system(1))
    trace = gated([[[0, 1]]], [[[0.9, 0.1]]])
    for defer in (-1, 3):
        with pytest.raises(InputError, match=f"^place static: defer must be from 0 to 2, got {defer}$"):
            build_controller(one_at_a_time(trace), system(defer), Budget(slots=1), HandCosts())
    with pytest.raises(ValueError, match="defer must be 0 with dense_follows, got 1"):
        system(1, evict="static-front", scope="global", dense_follows=True)


DYADIC = st.sampled_from([0.25, 0.75, 1.0, 3.125, 8.0])
COSTS = st.builds(
    lambda dense, gpu, cpu, copy, joins, idle: HandCosts(
        dense=dense, gpu=gpu, cpu=cpu, copy=copy, cpu_first=idle,
        host=host(layer_s=idle, operation_s=idle / 4, joins_layers=joins),
    ),
    DYADIC, DYADIC, DYADIC, DYADIC, st.booleans(), st.sampled_from([0.0, 0.25, 1.0]),
)  # fmt: skip
"""Seconds whose sums are exact."""
DEFERRING = st.fixed_dictionaries(
    {
        "evict": st.sampled_from(["static-uniform", "lru"]),
        "scope": st.sampled_from(["layer", "global"]),
        "prefetch": st.sampled_from(["none", "next-router", "oracle"]),
        "synchronous": st.booleans(),
        "write_back": st.booleans(),
    }
)


@settings(max_examples=100)
@given(workloads(), st.integers(1, 3), st.none() | st.integers(1, 12), DEFERRING, COSTS, st.integers(0, 1))
def test_all_machines_tell_the_same_story(
    workload: Workload, slots: int, held: int | None, fields: dict[str, Any], costs: HandCosts, defer: int
) -> None:
    if fields["prefetch"] != "none":
        held = None
    given_ = {"place": "static", "options": {"place": {"defer": defer}}, **fields}
    closed, events = (run(workload, slots, costs, host_slots=held, closed=way, **given_) for way in (True, False))
    for name in ("tokens", "layers", "operations"):
        assert getattr(closed, name).equals(getattr(events, name)), name


@settings(max_examples=60)
@given(workloads(), st.integers(1, 3), COSTS, st.integers(1, 1))
def test_deferral_never_costs_time_and_keeps_to_the_bounds(
    workload: Workload, slots: int, costs: HandCosts, defer: int
) -> None:
    def total_s(deferred: int) -> float:
        result = simulate(workload, system(deferred), Budget(slots=slots), costs, hardware="by hand")
        return float(result.tokens.end_s.max())

    layers = workload.trace.header.layers
    assert total_s(defer) <= total_s(0)
    assert bounds_of(workload, costs, slots * layers, defers=True).run.seconds <= total_s(defer) + 1e-9
