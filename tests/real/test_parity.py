"""Parity: what the engine and the executor really submit is the same, entry for entry, where that is promised.

The mutations at the end break the executor on purpose, and have to be noticed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from real.cpu_device import CpuDevice
from real.decode import Machine, replay
from real.device import Work
from real.executor import Executor
from real.record import Collector
from real.routing import RouterTap
from real.store import DeviceSlots, SlotError
from sim.controller import OffloadController
from sim.engine import BEFORE
from sim.plan import COPY, CPU, GPU, Operation
from sim.policies import EVICTION, PLACEMENT
from sim.replay.calibration import TraceCalibration
from sim.replay.feed import Feed
from sim.results import RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import (
    COSTS,
    DEVICES,
    PROMPTS,
    assert_near,
    decoded,
    follow,
    machine_on,
    plain,
    untouched,
)
from traces.schema import Trace
from traces.synthetic import Sizes, markov
from traces.workload import Workload, lock_step

DECIDED = [
    "step",
    "layer",
    "phase",
    "assignments",
    "union",
    "hits_union",
    "hits_assignments",
    "late_hits",
    "misses",
    "cpu_experts",
    "bytes",
]
"""Columns of the layers table that are decisions, not times."""

SLOTS = {"layer": 3, "global": 5}

RUNS = [("lru", trace, batch) for trace in ("recorded", "synthetic") for batch in (1, 3)]
RUNS += [(evict, *run) for evict in EVICTION if evict != "lru" for run in (("recorded", 3), ("synthetic", 1))]
"""Eviction policies with the traces and batches that they are run on."""


def placements_for(evict: str) -> list[str]:
    """All with LRU; with any other policy ``fetch``, and in turn one of the rest."""
    first, *others = PLACEMENT
    return [first, *others] if evict == "lru" else [first, others[[*EVICTION].index(evict) % len(others)]]


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


@pytest.fixture(scope="module")
def cpu() -> Iterator[Machine]:
    with machine_on("cpu") as machine:
        yield machine


@cache
def recorded() -> Trace:
    """Three lanes of the tiny model, which end at different steps."""
    loaded, collector = tiny.model(), Collector(tiny.model(), lookahead_depth=1)
    with RouterTap(loaded.layers, collector):
        tiny.logits_of(loaded, PROMPTS, [[7] * 6, [8] * 3, [9] * 5], hooks=collector)
    return collector.finish()


@cache
def synthetic(recall: float = 0.7) -> Trace:
    sizes = Sizes(
        sequences=3,
        prompt_tokens=5,
        new_tokens=6,
        layers=2,
        experts=8,
        top_k=2,
        expert_bytes=tiny.SPECS["qwen3_moe"].expert_bytes,
        lookahead=1,
        lookahead_recall=recall,
    )
    return markov(np.random.default_rng(5), sizes, locality=0.4)


TRACES = {"recorded": recorded, "synthetic": synthetic}


@cache
def calibration() -> TraceCalibration:
    """What fitted policies learn from: another trace of the same shape."""
    return TraceCalibration(Feed.of(synthetic(recall=0.2), 1))


def both(machine: Machine, workload: Workload, slots: int, **system: Any) -> tuple[RunResult, RunResult]:
    """The run as it was measured, and as it was simulated."""
    spec, budget = SystemSpec(**system), Budget(slots=slots)
    fit = calibration() if "calibration" in spec.needs else None
    measured = replay(machine, workload, spec, budget, COSTS, calibration=fit)
    return measured, simulate(workload, spec, budget, COSTS, hardware="by hand", calibration=fit)


def assert_equal_decisions(measured: RunResult, simulated: RunResult) -> None:
    pd.testing.assert_frame_equal(measured.operations, simulated.operations)
    pd.testing.assert_frame_equal(measured.layers[DECIDED], simulated.layers[DECIDED])
    same = ["step", "phase", "sequence", "tokens"]
    pd.testing.assert_frame_equal(measured.tokens[same], simulated.tokens[same])
    counts = ["sequence", "prompt_tokens", "new_tokens"]
    pd.testing.assert_frame_equal(measured.requests[counts], simulated.requests[counts])


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "overlapped"])
@pytest.mark.parametrize(("evict", "trace", "batch"), RUNS)
def test_demand_only_runs_have_equal_logs(
    machine: Machine, evict: str, trace: str, batch: int, synchronous: bool
) -> None:
    workload = lock_step(TRACES[trace](), batch)
    for place, scope in product(placements_for(evict), ("layer", "global")):
        system = {"evict": evict, "place": place, "scope": scope, "synchronous": synchronous}
        measured, simulated = both(machine, workload, SLOTS[scope], **system)
        assert_equal_decisions(measured, simulated)
        pools = 1 if scope == "global" else 2
        follow(measured.operations, pools * SLOTS[scope])


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACEMENT)
def test_every_eviction_policy_has_equal_logs_with_every_placement(cpu: Machine, place: str) -> None:
    workload = lock_step(synthetic(), 3)
    for evict, scope in product(EVICTION, ("layer", "global")):
        measured, simulated = both(cpu, workload, SLOTS[scope], evict=evict, place=place, scope=scope, synchronous=True)
        assert_equal_decisions(measured, simulated)


@pytest.mark.parametrize("slots", [1, 8])
def test_logs_are_equal_with_the_fewest_and_the_most_slots(machine: Machine, slots: int) -> None:
    workload = lock_step(recorded(), 3)
    for evict in EVICTION:
        measured, simulated = both(machine, workload, slots, evict=evict, synchronous=True)
        assert_equal_decisions(measured, simulated)
        copies = measured.operations[measured.operations.op == COPY]
        assert len(copies) > 0
        assert measured.layers.misses.sum() == (copies.step != BEFORE).sum()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("evict", list(EVICTION))
def test_prefetch_conserves_what_is_counted(machine: Machine, evict: str, batch: int) -> None:
    for place, trace in product(placements_for(evict), TRACES.values()):
        workload = lock_step(trace(), batch)
        for run in both(machine, workload, 3, evict=evict, place=place, prefetch="next-router"):
            layers = run.layers
            assert (layers.hits_union + layers.late_hits + layers.misses == layers.union).all()
            assert (run.operations.op == GPU).sum() + layers.cpu_experts.sum() == layers.union.sum()
            assert layers.bytes.sum() <= run.operations.bytes.sum()
            follow(run.operations, 6)
        measured, simulated = both(machine, workload, 3, evict=evict, place=place, prefetch="next-router")
        same = ["step", "layer", "phase", "assignments", "union"]
        pd.testing.assert_frame_equal(measured.layers[same], simulated.layers[same])


@pytest.mark.parametrize("place", [name for name in PLACEMENT if PLACEMENT[name].takes_hits])
def test_residents_on_the_cpu_change_no_token(machine: Machine, place: str) -> None:
    """The CPU computes them from the host's copy, with the weights of their own place in the router's choice."""
    wanted_tokens, wanted = plain(machine.device.name, "qwen3_moe", len(PROMPTS), 6)
    for slots in (3, 8):
        run = decoded(machine, PROMPTS, 6, slots, place=place)
        assert run.tokens == wanted_tokens
        assert_near(run.logits, wanted)
        follow(run.operations, 2 * slots)
    gpu_experts = run.operations[run.operations.op == GPU][["layer", "expert"]].itertuples(index=False)
    cpu_experts = run.operations[run.operations.op == CPU][["layer", "expert"]].itertuples(index=False)
    assert {*gpu_experts} & {*cpu_experts}, "with a slot for each expert, what the GPU has had is resident"


def test_prefetches_have_their_events_and_hits(machine: Machine) -> None:
    measured, _ = both(machine, lock_step(recorded(), 1), 4, prefetch="next-router")
    prefetched = measured.events[measured.events.kind == "prefetch"]
    copies = measured.events[measured.events.kind == "copy"]
    assert len(prefetched) > 0
    assert (prefetched.layer == 1).all(), "there is nothing to predict for the first layer"
    assert len(prefetched) + len(copies) == (measured.operations.op == COPY).sum()
    assert (prefetched.resource == "link").all()


def test_prefetches_under_way_at_the_end_of_a_run_have_their_events_too(
    cpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = DeviceSlots.load

    def slow(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        time.sleep(5e-3)
        load(slots, slot, layer, expert)

    monkeypatch.setattr(DeviceSlots, "load", slow)
    trace = synthetic(recall=0.0)  # nobody ever waits for what is prefetched
    measured, _ = both(cpu, lock_step(trace, 3), 4, prefetch="next-router")
    assert (measured.events.kind == "prefetch").sum() > 0
    assert measured.events.kind.isin(["copy", "prefetch"]).sum() == (measured.operations.op == COPY).sum()


class Nth:
    """Counts calls, and says which one is to be broken."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.number


def test_a_swapped_copy_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    load, broken = DeviceSlots.load, Nth(5)

    def swapped(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        load(slots, slot, layer, (expert + 1) % 8 if broken() else expert)

    monkeypatch.setattr(DeviceSlots, "load", swapped)
    with pytest.raises(SlotError, match=r"slot \d must hold expert"):
        both(cpu, lock_step(recorded(), 1), 3, synchronous=True)
    assert broken.calls >= broken.number
    assert untouched(cpu)


def test_a_skipped_copy_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, broken = CpuDevice.copy, Nth(5)

    def skipping(device: CpuDevice, run: Any, after: Any, *, prefetch: bool = False) -> Work:
        return copy(device, (lambda: None) if broken() else run, after, prefetch=prefetch)

    monkeypatch.setattr(CpuDevice, "copy", skipping)
    with pytest.raises(SlotError):
        both(cpu, lock_step(recorded(), 1), 3, synchronous=True)


def mutated_start(monkeypatch: pytest.MonkeyPatch, op: str, into: str) -> Nth:
    """From now on the executor sends its fifth operation of kind ``op`` where ``into`` runs."""
    start, broken = Executor._start, Nth(5)

    def wrong(executor: Executor, operation: Operation, kernel: Any) -> Work:
        if operation.op == op and broken():
            operation = operation._replace(op=into)
        return start(executor, operation, kernel)

    monkeypatch.setattr(Executor, "_start", wrong)
    return broken


def test_an_operation_on_the_wrong_device_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutated_start(monkeypatch, GPU, CPU)
    measured, simulated = both(cpu, lock_step(recorded(), 1), 3, synchronous=True)
    assert broken.calls >= broken.number
    with pytest.raises(AssertionError):
        assert_equal_decisions(measured, simulated)
    differing = measured.operations[(measured.operations != simulated.operations).any(axis=1)]
    assert differing.op.tolist() == [CPU]


def test_a_cpu_expert_on_the_gpu_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated_start(monkeypatch, CPU, GPU)
    with pytest.raises(SlotError):
        both(cpu, lock_step(recorded(), 1), 3, place="cpu-on-miss", synchronous=True)


def test_another_decision_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, system, budget = lock_step(recorded(), 1), SystemSpec(synchronous=True), Budget(slots=3)
    simulated = simulate(workload, system, budget, COSTS, hardware="by hand")
    plan_layer = OffloadController.plan_layer

    def reordered(controller: OffloadController, *args: Any) -> Any:
        plan = plan_layer(controller, *args)
        *before, one, other = plan.operations
        return plan._replace(operations=[*before, other, one]) if one.op == other.op == GPU else plan

    monkeypatch.setattr(OffloadController, "plan_layer", reordered)
    measured = replay(cpu, workload, system, budget, COSTS)
    with pytest.raises(AssertionError):
        assert_equal_decisions(measured, simulated)


def slow_copies(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """From now on copies take up to a millisecond more, before and after their bytes are there."""
    load, rng = DeviceSlots.load, np.random.default_rng(seed)

    def slow(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        slots._tags[slot] = (-1, -1)
        time.sleep(rng.uniform(0, 1e-3))
        load(slots, slot, layer, expert)
        time.sleep(rng.uniform(0, 1e-4))

    monkeypatch.setattr(DeviceSlots, "load", slow)


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
def test_slow_copies_find_no_race(cpu: Machine, monkeypatch: pytest.MonkeyPatch, prefetch: str) -> None:
    slow_copies(monkeypatch, 3)
    for slots, batch in ((1, 3), (3, 1)):
        measured, simulated = both(cpu, lock_step(recorded(), batch), slots, prefetch=prefetch)
        if prefetch == "none":
            assert_equal_decisions(measured, simulated)
        follow(measured.operations, 2 * slots)


def test_a_copy_that_is_not_waited_for_is_noticed(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = CpuDevice.gpu
    slow_copies(monkeypatch, 3)
    monkeypatch.setattr(CpuDevice, "gpu", lambda device, run, after: gpu(device, run, ()))
    with pytest.raises(SlotError):
        both(cpu, lock_step(recorded(), 1), 3)
    assert untouched(cpu)
