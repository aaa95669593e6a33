"""Write-backs on the real clock: a victim's bytes really go back to the host, and are there before its slot is used."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from real.decode import Machine, replay
from real.store import DeviceSlots, SlotError
from sim.plan import COPY, EVICT
from sim.results import RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, follow, machine_on, untouched
from tests.real.test_parity import SLOTS, assert_equal_decisions
from traces.errors import InputError
from traces.synthetic import Sizes, markov
from traces.workload import Workload, lock_step

SIZES = Sizes(
    sequences=3,
    prompt_tokens=5,
    new_tokens=6,
    layers=2,
    experts=8,
    top_k=2,
    expert_bytes=tiny.SPECS["qwen3_moe"].expert_bytes,
    lookahead=1,
    lookahead_recall=0.7,
)


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


def workload() -> Workload:
    return lock_step(markov(np.random.default_rng(5), SIZES, locality=0.4), 1)


def measure(machine: Machine, system: SystemSpec, slots: int = 3) -> RunResult:
    return replay(machine, workload(), system, Budget(slots=slots), COSTS)


def every_expert(machine: Machine) -> list[torch.Tensor]:
    return [machine.store.expert(layer, expert).clone() for layer in range(2) for expert in range(8)]


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "overlapped"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("place", ["fetch", "dali-greedy"])
def test_both_clocks_write_back_alike(machine: Machine, place: str, scope: str, synchronous: bool) -> None:
    system = SystemSpec.model_validate({"write_back": True, "place": place, "scope": scope, "synchronous": synchronous})
    measured = measure(machine, system, SLOTS[scope])
    simulated = simulate(workload(), system, Budget(slots=SLOTS[scope]), COSTS, hardware="by hand")
    assert_equal_decisions(measured, simulated)
    follow(measured.operations, SLOTS[scope] * (2 if scope == "layer" else 1))
    evictions = measured.operations[measured.operations.op == EVICT]
    assert len(evictions) > 0
    assert (evictions.bytes == SIZES.expert_bytes).all()
    rows = measured.events[measured.events.kind == "write-back"]
    assert len(rows) == len(evictions)
    assert (rows.resource == "link-back").all()
    assert (rows.end_s > rows.start_s).all()


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
def test_the_bytes_of_a_slot_reach_the_host_and_are_those_of_its_expert(
    machine: Machine, prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, load = every_expert(machine), DeviceSlots.load

    def load_and_lose(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        time.sleep(1e-3)
        load(slots, slot, layer, expert)
        kept = slot < 2 * SLOTS["layer"]  # what passes through a staging slot is not written back
        if kept and machine.device.name == "cpu":  # elsewhere the copy may not have been made yet
            machine.store.expert(layer, expert).zero_()

    monkeypatch.setattr(DeviceSlots, "load", load_and_lose)
    result = measure(machine, SystemSpec(write_back=True, prefetch=prefetch))
    holds = {slot: expert for slot, expert in _last(result).items() if expert is not None}
    for block, weights in enumerate(before):
        if divmod(block, 8) in holds.values() and machine.device.name == "cpu":
            with torch.inference_mode():
                machine.store.expert(*divmod(block, 8)).copy_(weights)  # still on the device when the run ended
        assert torch.equal(machine.store.expert(*divmod(block, 8)), weights)


def _last(result: RunResult) -> dict[int, tuple[int, int] | None]:
    """What each slot holds in the end."""
    holds: dict[int, tuple[int, int] | None] = {}
    for row in result.operations.itertuples(index=False):
        if row.op in (COPY, EVICT):
            holds[row.slot] = (row.layer, row.expert) if row.op == COPY else None
    return holds


def test_a_write_back_of_another_expert_is_noticed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    save = DeviceSlots.save

    def swapped(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        save(slots, slot, layer, (expert + 1) % 8)

    monkeypatch.setattr(DeviceSlots, "save", swapped)
    with pytest.raises(SlotError, match=r"slot \d must hold expert"):
        measure(machine, SystemSpec(write_back=True))
    assert untouched(machine)


def test_a_measured_run_reads_from_no_disk(machine: Machine) -> None:
    with pytest.raises(InputError, match="host_slots must be left out of a measured run, got 4"):
        replay(machine, workload(), SystemSpec(), Budget(slots=3, host_slots=4), COSTS)
