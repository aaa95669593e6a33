"""While the host waits, a CUDA device hands over what is left of prefetches, and has further ones asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from real import cuda_device
from real.cuda_device import PIECES, CudaDevice
from real.device import Work
from tests.real.fake_cuda import FakeGpu, Mark

COUNT = 40


@pytest.fixture(params=range(4))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu(request.param)
    monkeypatch.setattr(cuda_device, "torch", gpu.torch())
    return gpu


@pytest.fixture
def device(gpu: FakeGpu) -> Iterator[CudaDevice]:
    with CudaDevice() as device:
        yield device


class Copies:
    """Copies whose pieces are counted as they run."""

    def __init__(self, gpu: FakeGpu, device: CudaDevice) -> None:
        self._gpu, self._device = gpu, device
        self.ran = self.most = 0
        self.works: list[Work] = []

    def submit(self, pieces: int, *, prefetch: bool = True) -> None:
        work = self._device.copy([self._piece] * pieces, (), prefetch=prefetch)
        self.works.append(work)

    def until(self, count: int) -> Callable[[], None]:
        """An expert of the CPU that takes until so many pieces have run."""

        def run() -> None:
            deadline_s = time.monotonic() + 5
            while self.ran < count and time.monotonic() < deadline_s:
                time.sleep(1e-4)

        return run

    def _piece(self) -> None:
        def run() -> None:
            self.ran += 1

        self._gpu.enqueue(run)
        self.most = max(self.most, sum(work.begun for work in self.works) - self.ran)


def held_back(gpu: FakeGpu, copies: Copies, count: int) -> None:
    """Compute that ends when so many pieces have run."""
    mark, step = Mark(), gpu.step
    gpu.current.queue.append(mark)

    def stepped() -> bool:
        if copies.ran >= count:
            mark.at = 0
        return step()

    gpu.step = stepped  # type: ignore[method-assign]


def test_the_link_has_work_all_the_time_that_the_cpu_takes(gpu: FakeGpu, device: CudaDevice) -> None:
    copies = Copies(gpu, device)
    copies.submit(COUNT)
    device.wait([device.cpu(copies.until(COUNT - PIECES))])  # with the last ones handed over, nothing is left to do
    assert copies.ran >= COUNT - PIECES
    assert copies.most <= PIECES + 1  # an event may come after its piece


def test_the_link_has_work_all_the_time_that_compute_takes(gpu: FakeGpu, device: CudaDevice) -> None:
    for wait in (device.await_compute, device.settle):
        copies = Copies(gpu, device)
        copies.submit(COUNT)
        held_back(gpu, copies, COUNT)
        wait()
        assert copies.ran == COUNT


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("waits_for", ["cpu", "compute"])
def test_further_copies_are_asked_for_as_they_end(
    gpu: FakeGpu, device: CudaDevice, waits_for: str, prefetch: bool
) -> None:
    copies, rounds = Copies(gpu, device), 6

    def ask() -> None:
        running = [work for work in copies.works if not work.done]
        if not running and len(copies.works) < rounds:
            copies.submit(3, prefetch=prefetch)

    if waits_for == "cpu":
        device.wait([device.cpu(copies.until(3 * rounds))], ask)
    else:
        ask()
        held_back(gpu, copies, 3 * rounds)
        device.await_compute(ask)
    assert copies.ran == 3 * rounds


def test_without_prefetches_the_host_does_not_look(
    gpu: FakeGpu, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*given: Any) -> Any:
        raise AssertionError("the host looked")

    monkeypatch.setattr(cuda_device, "wait_for", looked)
    monkeypatch.setattr(device._compute, "query", looked, raising=False)
    copies, asked = Copies(gpu, device), list[int]()
    copies.submit(3, prefetch=False)
    device.wait([device.cpu(lambda: None)])
    device.await_compute()
    device.settle()
    device.drain()
    device.wait([device.cpu(lambda: None)], lambda: asked.append(1))
    device.await_compute(lambda: asked.append(1))
    assert asked == [1]


def test_what_the_host_does_meanwhile_is_no_waiting(
    gpu: FakeGpu, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks, asked = [0.0], list[int](), list[int]()
    monkeypatch.setattr(cuda_device, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    copies = Copies(gpu, device)
    copies.submit(4, prefetch=False)
    over = device._compute.query

    def look() -> bool:
        looks.append(1)
        clock[0] += 1.0
        return over()

    def ask() -> None:
        asked.append(1)
        clock[0] += 1000.0

    monkeypatch.setattr(device._compute, "query", look, raising=False)
    held_back(gpu, copies, 4)
    before_s = device.waited_s
    device.await_compute(ask)
    assert device.waited_s - before_s == len(looks) > 0


def test_a_blocking_wait_counts_as_a_whole(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def block() -> None:
        clock[0] += 3.0

    monkeypatch.setattr(cuda_device, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(device._compute, "synchronize", block, raising=False)
    before_s = device.waited_s
    device.await_compute()
    assert device.waited_s - before_s == 3.0
