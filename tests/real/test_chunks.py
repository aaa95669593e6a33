"""Copies in chunks: a demand waits for one of them, what is waited for goes on, and a slot is whole with the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real.cpu_device import CpuDevice
from real.decode import Machine, replay
from real.device import Device, open_device
from real.executor import _bounds
from real.store import DeviceSlots, SlotError
from sim.systems import Budget, SystemSpec
from tests.real.running import COSTS, DEVICES, machine_on, own_model
from tests.real.test_prefetch import workload


@pytest.fixture
def cpu() -> Iterator[CpuDevice]:
    with CpuDevice() as device:
        yield device


class Held:
    """A first chunk that holds the link until it is let go, and a list of what ran after it."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self._go, self._held = threading.Event(), threading.Event()

    def chunks(self, *names: str) -> list[Callable[[], None]]:
        return [self._hold, *map(self.note, names)]

    def note(self, name: str) -> Callable[[], None]:
        return lambda: self.ran.append(name)

    def wait_until_held(self) -> None:
        assert self._held.wait(10)

    def let_go(self) -> None:
        self._go.set()

    def _hold(self) -> None:
        self._held.set()
        assert self._go.wait(10)


def held_prefetch(cpu: CpuDevice, held: Held, *names: str):
    work = cpu.copy(held.chunks(*names), (), prefetch=True)
    cpu.flush()
    held.wait_until_held()
    return work


def test_a_demand_waits_for_one_chunk_of_a_prefetch(cpu: CpuDevice) -> None:
    held = Held()
    prefetch = held_prefetch(cpu, held, "second", "third")
    demand = cpu.copy(held.note("demand"), ())
    held.let_go()
    cpu.wait([demand])
    assert held.ran[0] == "demand"
    cpu.wait([prefetch])
    assert held.ran == ["demand", "second", "third"]
    (first, rest) = prefetch.stretches
    assert first[0] == prefetch.start_s <= first[1] <= demand.start_s <= demand.end_s <= rest[0]
    assert rest[1] == prefetch.end_s


def test_a_demand_that_cannot_begin_stops_nothing(cpu: CpuDevice) -> None:
    held = Held()
    prefetch = held_prefetch(cpu, held, "second")
    reader = cpu.gpu(held.note("read"), [prefetch])
    demand = cpu.copy(held.note("demand"), [reader])
    held.let_go()
    cpu.wait([demand])
    assert held.ran == ["second", "read", "demand"]
    assert prefetch.stretches == ()


def test_a_prefetch_that_is_waited_for_goes_on(cpu: CpuDevice) -> None:
    held = Held()
    prefetch = held_prefetch(cpu, held, "second", "third")
    cpu.promote([prefetch])
    demand = cpu.copy(held.note("demand"), ())
    held.let_go()
    cpu.wait([prefetch, demand])
    assert held.ran == ["second", "third", "demand"]


def test_a_prefetch_that_has_made_way_comes_before_later_demands_once_it_is_waited_for(cpu: CpuDevice) -> None:
    held, other = Held(), Held()
    prefetch = held_prefetch(cpu, held, "second", "third")
    first = cpu.copy(other.chunks(), ())
    held.let_go()
    other.wait_until_held()
    cpu.promote([prefetch])
    later = cpu.copy(held.note("later"), ())
    other.let_go()
    cpu.wait([first, prefetch, later])
    assert held.ran == ["second", "third", "later"]


def test_what_waits_for_a_copy_waits_for_its_last_chunk(cpu: CpuDevice) -> None:
    held = Held()
    prefetch = held_prefetch(cpu, held, "second", "third")
    reader = cpu.gpu(held.note("read"), [prefetch])
    demand = cpu.copy(held.note("demand"), ())
    held.let_go()
    cpu.wait([reader])
    assert demand.done
    assert held.ran == ["demand", "second", "third", "read"]


def test_draining_drops_the_chunks_that_have_not_begun(cpu: CpuDevice) -> None:
    held = Held()
    prefetch = held_prefetch(cpu, held, "dropped", "dropped")
    drained = threading.Thread(target=let_go_once_draining, args=(cpu, held))
    drained.start()
    cpu.drain()
    drained.join()
    assert not prefetch.done
    cpu.wait([cpu.copy(held.note("next"), ())])
    assert held.ran == ["next"]


def let_go_once_draining(cpu: CpuDevice, held: Held) -> None:
    deadline_s = time.monotonic() + 10
    while not cpu.draining and time.monotonic() < deadline_s:
        time.sleep(0.001)
    held.let_go()


def test_a_chunk_that_fails_ends_its_copy(cpu: CpuDevice) -> None:
    ran: list[str] = []
    copy = cpu.copy([lambda: ran.append("first"), lambda: 1 / 0, lambda: ran.append("third")], (), prefetch=True)
    reader = cpu.gpu(lambda: ran.append("read"), [copy])
    with pytest.raises(ZeroDivisionError):
        cpu.wait([reader])
    assert ran == ["first"]
    assert copy.chunks == ()


@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 3))
def test_chunks_cover_an_expert_in_order(elements: int, chunk_bytes: int, pieces: int) -> None:
    flat = torch.empty(elements)  # of 4 bytes each
    bounds = _bounds(flat, chunk_bytes, pieces)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == elements
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    most = max(1, min(elements, chunk_bytes // 4) // pieces) if chunk_bytes else elements
    assert all(stop - start == most for start, stop in bounds[:-1])
    assert 0 < bounds[-1][1] - bounds[-1][0] <= most


@pytest.fixture(params=DEVICES)
def opened(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as device, torch.inference_mode():
        yield device


def test_a_slot_is_whole_with_its_last_chunk(opened: Device) -> None:
    machine = Machine.prepare(own_model(), opened)
    slots = DeviceSlots(machine.store, 1, opened.torch_device)
    slots.load(0, 1, 2)
    parts = _bounds(machine.store.expert(1, 5), 1000)
    assert len(parts) > 2
    for part in parts:
        for expert in (2, 5):
            if part != parts[0] or expert == 5:
                with pytest.raises(SlotError):
                    slots.read(0, 1, expert)
        slots.load_part(0, 1, 5, *part)
    opened.drain()
    weights = machine.store.views(machine.store.expert(1, 5))
    assert all(torch.equal(got.cpu(), one) for got, one in zip(slots.read(0, 1, 5), weights, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_prefetches_in_chunks_have_their_bytes_and_their_events(device: str) -> None:
    with machine_on(device) as machine:
        machine.device.chunk_bytes = 1000
        run = replay(machine, workload(1), SystemSpec(prefetch="next-router"), Budget(slots=3), COSTS)
    copied = run.operations[run.operations.op == "copy"]
    link = run.events[run.events.resource == "link"].sort_values("start_s")
    assert (link.kind == "prefetch").any()
    moved = copied.groupby(["layer", "expert"]).size()
    assert (link.groupby(["layer", "expert"]).size() >= moved).all()  # one row a stretch
    assert (link.end_s > link.start_s).all()
    if device == "cpu":  # one copy at a time
        assert (link.start_s.to_numpy()[1:] >= link.end_s.to_numpy()[:-1]).all()
