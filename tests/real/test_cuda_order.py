"""The CUDA device's own order, on streams that run in any order which its events allow: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

import numpy as np
import pytest

from real import cuda_device
from real.cuda_device import PIECES, CudaDevice
from real.device import Work
from tests.real.fake_cuda import FakeGpu

CHUNKS, SLOTS = 7, 3


@pytest.fixture(params=range(12))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu(request.param)
    monkeypatch.setattr(cuda_device, "torch", gpu.torch())
    return gpu


@pytest.fixture
def device(gpu: FakeGpu) -> Iterator[CudaDevice]:
    with CudaDevice() as device:
        yield device


def stress(gpu: FakeGpu, device: CudaDevice, *, count: int = 40) -> tuple[int, list[Work]]:
    """Random copies into slots of :data:`CHUNKS` parts, each read once and some written back: how many of them found
    something else, and all work."""
    rng = gpu.rng
    slots = [[-1] * CHUNKS for _ in range(SLOTS)]
    found: list[tuple[int, list[int]]] = []
    last: list[list[Work]] = [[] for _ in range(SLOTS)]  # what has to end before a slot is filled again
    works: list[Work] = []

    def chunk(slot: int, place: int, number: int) -> Callable[[], None]:
        def fill() -> None:
            slots[slot][place] = number

        return lambda: gpu.enqueue(fill)

    def look(slot: int, number: int) -> Callable[[], None]:
        return lambda: gpu.enqueue(lambda: found.append((number, [*slots[slot]])))

    for number in range(count):
        slot, prefetch = int(rng.integers(SLOTS)), bool(rng.random() < 0.6)
        parts = [chunk(slot, place, number) for place in range(CHUNKS)]
        copy = device.copy(parts, last[slot], prefetch=prefetch)
        if rng.random() < 0.3:
            device.promote([copy])
        if rng.random() < 0.3:
            device.flush()
        reads = [device.gpu(look(slot, number), [copy])]
        if rng.random() < 0.3:
            reads.append(device.save(look(slot, number), [copy]))
        last[slot] = reads
        works += [copy, *reads]
        if rng.random() < 0.2:
            device.settle()
    device.wait(works)
    device.drain()
    return sum(seen != [number] * CHUNKS for number, seen in found), works


def test_every_order_that_the_events_allow_is_right(gpu: FakeGpu, device: CudaDevice) -> None:
    wrong, works = stress(gpu, device)
    assert wrong == 0
    assert all(work.finished for work in works)
    assert all(work.start_s < work.end_s for work in works)


def test_the_same_work_again_needs_no_further_event(
    gpu: FakeGpu, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "ANCHOR_S", inf)  # one more whenever that has passed
    made = []
    for _ in range(4):
        gpu.rng = np.random.default_rng(5)
        stress(gpu, device)
        made.append(gpu.events)
    assert set(made) == {made[0]}


def wrong_in_some_order(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a read finds something else, or an end is taken to have come that has not."""
    for seed in range(20):
        gpu = FakeGpu(seed)
        monkeypatch.setattr(cuda_device, "torch", gpu.torch())
        try:
            with CudaDevice() as device:
                wrong, _ = stress(gpu, device)
        except AssertionError:
            return True
        if wrong:
            return True
    return False


def test_an_order_without_waits_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wrong_in_some_order(monkeypatch)
    monkeypatch.setattr(CudaDevice, "_wait_on", lambda device, stream, after: None)
    assert wrong_in_some_order(monkeypatch)


def test_chunks_that_go_on_without_those_before_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_over(device: CudaDevice, work: Work) -> None:
        if work in device._waiting:
            device._waiting.remove(work)
            device._submit(device._demand, work, len(work.chunks) - work.begun)

    monkeypatch.setattr(CudaDevice, "_hand_over", hand_over)
    assert wrong_in_some_order(monkeypatch)


def test_compute_comes_after_the_copies_that_were_waited_for(gpu: FakeGpu, device: CudaDevice) -> None:
    slot, seen = [0], []

    def fill() -> None:
        slot[0] = 1

    copies = [device.copy(lambda: gpu.enqueue(fill), (), prefetch=prefetch) for prefetch in (False, True)]
    device.wait(copies)
    device.gpu(lambda: gpu.enqueue(lambda: seen.append(slot[0])), ())
    device.settle()
    assert seen == [1]
    assert all(copy.done for copy in copies)


def test_few_chunks_of_prefetches_are_under_way(gpu: FakeGpu, device: CudaDevice) -> None:
    ran: list[int] = []

    def chunk(number: int) -> Callable[[], None]:
        return lambda: gpu.enqueue(lambda: ran.append(number))

    works = [device.copy([chunk(number) for number in range(first, first + 5)], (), prefetch=True) for first in (0, 5)]
    handed = sum(work.begun for work in works)
    assert PIECES <= handed < 10
    for _ in range(200):
        device.flush()
        assert sum(work.begun for work in works) - len(ran) <= PIECES + 1  # an event may come after its chunk
        if all(work.done for work in works):
            break
    assert ran == [*range(10)]


def test_draining_drops_the_chunks_that_were_not_handed_over(gpu: FakeGpu, device: CudaDevice) -> None:
    ran: list[int] = []
    parts = [lambda: gpu.enqueue(lambda: ran.append(1)) for _ in range(100)]
    work = device.copy(parts, (), prefetch=True)
    device.drain()
    device.flush()
    gpu.synchronize()
    assert len(ran) == work.begun < 100
    assert not work.done


def test_a_chunk_that_fails_leaves_the_device_usable(gpu: FakeGpu, device: CudaDevice) -> None:
    def fail() -> None:
        raise MemoryError("no more")

    def submit() -> Sequence[Work]:
        return [device.copy([lambda: None, fail, lambda: None], (), prefetch=True)]

    with pytest.raises(MemoryError, match="no more"):
        device.wait(submit())
    device.drain()
    wrong, _ = stress(gpu, device)
    assert wrong == 0


def test_long_runs_keep_their_clock(gpu: FakeGpu, device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device.mark()
    device.settle()
    anchor = device._base
    monkeypatch.setattr(cuda_device, "ANCHOR_S", -1e9)
    device.settle()
    assert device._base is not anchor
    after = device.mark()
    device.settle()
    assert device.time_of(before) < device.time_of(after)
