"""The contract of a device, on each one; and what only the CPU device promises: its order, its threads, its cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch

from real.cpu_device import CpuDevice
from real.device import Device, Work, open_device
from tests.real.running import DEVICES
from traces.errors import InputError

SLOT = 256
"""Elements of a slot."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as device, torch.inference_mode():
        yield device


@pytest.fixture
def cpu() -> Iterator[CpuDevice]:
    with CpuDevice() as device:
        yield device


def pause(device: Device, seconds: float) -> None:
    """Keeps a lane or a stream busy."""
    if device.name == "cuda":
        torch.cuda._sleep(int(seconds * 1e9))
    else:
        time.sleep(seconds)


def slots(device: Device, count: int = 1) -> torch.Tensor:
    zeros = torch.zeros(count, SLOT, device=device.torch_device)
    device.drain()  # before any copy, which may run on another stream
    return zeros


def source(device: Device, value: float) -> torch.Tensor:
    return torch.full((SLOT,), value, pin_memory=device.name == "cuda")


def finish(device: Device, *works: Work) -> None:
    device.wait(works)
    device.settle()


def test_compute_runs_in_order_of_submission(device: Device) -> None:
    (value,) = slots(device)
    works = [device.gpu(step, ()) for _ in range(5) for step in (lambda: value.add_(1), lambda: value.mul_(2))]
    finish(device, *works)
    assert value[0] == 62
    assert all(work.start_s <= work.end_s for work in works)
    assert all(one.end_s <= other.start_s + 1e-9 for one, other in pairwise(works))


def test_compute_waits_for_its_copy_and_a_copy_for_the_last_read_of_its_slot(device: Device) -> None:
    slot, seen = slots(device)[0], slots(device, 2)

    def load(value: torch.Tensor) -> None:
        pause(device, 0.002)
        slot.copy_(value, non_blocking=True)

    def read(place: int) -> None:
        pause(device, 0.002)
        seen[place].copy_(slot)

    sources = [source(device, 1.0), source(device, 2.0)]
    first = device.copy(lambda: load(sources[0]), ())
    reader = device.gpu(lambda: read(0), [first])
    second = device.copy(lambda: load(sources[1]), [reader])
    last = device.gpu(lambda: read(1), [second])
    finish(device, last)
    assert seen[:, 0].tolist() == [1.0, 2.0]
    assert first.end_s <= reader.start_s <= reader.end_s <= second.start_s <= second.end_s <= last.start_s


@pytest.mark.parametrize("promoted", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_compute_waits_for_every_chunk_of_its_copy(device: Device, prefetch: bool, promoted: bool) -> None:
    slot, seen = slots(device, 2)
    ones, parts = source(device, 1.0), 8
    width = SLOT // parts

    def chunk(place: int) -> Callable[[], None]:
        def load() -> None:
            pause(device, 0.0005)
            slot[place : place + width].copy_(ones[place : place + width], non_blocking=True)

        return load

    copy = device.copy([chunk(place) for place in range(0, SLOT, width)], (), prefetch=prefetch)
    if promoted:
        device.promote([copy])
    reader = device.gpu(lambda: seen.copy_(slot), [copy])
    finish(device, reader)
    assert seen.tolist() == ones.tolist()
    assert copy.start_s < copy.end_s <= reader.start_s


def test_experts_on_the_cpu_are_done_when_waited_for(device: Device) -> None:
    done: list[int] = []
    works = [device.cpu(lambda number=number: done.append(number)) for number in range(3)]
    finish(device, *works)
    assert done == [0, 1, 2]
    assert [work.resource for work in works] == ["cpu"] * 3
    assert all(0 < work.start_s <= work.end_s <= device.now_s() for work in works)


def test_marks_and_works_share_one_clock(device: Device) -> None:
    (value,) = slots(device)
    before = device.mark()
    work = device.gpu(lambda: pause(device, 0.002), ())
    finish(device, work)
    after = device.mark()
    device.settle()
    assert device.time_of(before) <= work.start_s < work.end_s <= device.time_of(after)
    assert value[0] == 0


@pytest.mark.parametrize("lane", ["gpu", "cpu", "copy"])
def test_an_error_comes_out_of_the_wait(device: Device, lane: str) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    def submit() -> Work:
        return device.cpu(fail) if lane == "cpu" else getattr(device, lane)(fail, ())

    with pytest.raises(RuntimeError, match="broken"):
        device.wait([submit()])
    (value,) = slots(device)
    finish(device, device.gpu(lambda: value.add_(1), ()))
    assert value[0] == 1


def test_a_device_works_on_after_draining(device: Device) -> None:
    (value,) = slots(device)
    for _ in range(3):
        device.copy(lambda: pause(device, 0.002), (), prefetch=True)
    device.cpu(lambda: time.sleep(0.002))
    device.flush()
    device.drain()
    finish(device, device.gpu(lambda: value.add_(1), ()))
    assert value[0] == 1


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device must be cpu, cuda or auto, got 'tpu'"):
        open_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu() -> None:
    with pytest.raises(InputError, match="device must be available, got cuda"):
        open_device("cuda")
    with open_device("auto") as device:
        assert device.name == "cpu"


class Gate:
    """Holds a lane of the CPU device back until it is opened, and notes what runs after that."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self._open = threading.Event()
        self._held = threading.Event()

    def hold(self) -> None:
        self._held.set()
        assert self._open.wait(10)

    def note(self, name: str) -> Callable[[], None]:
        return lambda: self.ran.append(name)

    def wait_until_held(self) -> None:
        assert self._held.wait(10)

    def open(self) -> None:
        self._open.set()


def test_demand_copies_go_before_prefetches_that_have_not_begun(cpu: CpuDevice) -> None:
    gate = Gate()
    works = [cpu.copy(gate.hold, (), prefetch=True)]
    cpu.flush()
    gate.wait_until_held()
    works += [cpu.copy(gate.note(name), (), prefetch=True) for name in ("early", "late")]
    works += [cpu.copy(gate.note("demand"), ())]
    gate.open()
    cpu.wait(works)
    assert gate.ran == ["demand", "early", "late"]


def test_a_promoted_prefetch_becomes_a_demand_copy(cpu: CpuDevice) -> None:
    gate = Gate()
    works = [cpu.copy(gate.hold, ())]
    cpu.flush()
    gate.wait_until_held()
    early, late = (cpu.copy(gate.note(name), (), prefetch=True) for name in ("early", "late"))
    first = cpu.copy(gate.note("demand"), ())
    cpu.promote([late, works[0]])  # one that has begun stays as it is
    last = cpu.copy(gate.note("last"), ())
    gate.open()
    cpu.wait([early, late, first, last])
    assert gate.ran == ["demand", "late", "last", "early"]


def test_only_prefetches_that_have_not_begun_are_taken_back(cpu: CpuDevice) -> None:
    gate = Gate()
    begun = cpu.copy(gate.hold, (), prefetch=True)
    cpu.flush()
    gate.wait_until_held()
    kept, late = (cpu.copy(gate.note(name), (), prefetch=True) for name in ("kept", "late"))
    promoted = cpu.copy(gate.note("promoted"), (), prefetch=True)
    cpu.promote([promoted])
    assert cpu.withdraw([begun, late, promoted]) == [late]
    gate.open()
    cpu.wait([begun, kept, promoted])
    assert gate.ran == ["promoted", "kept"]


def test_a_prefetch_may_pass_a_demand_copy_that_cannot_begin(cpu: CpuDevice) -> None:
    gate, order = Gate(), Gate()
    reader = cpu.gpu(gate.hold, ())
    blocked = cpu.copy(order.note("demand"), [reader])
    free = cpu.copy(order.note("prefetch"), (), prefetch=True)
    cpu.wait([free])
    gate.open()
    cpu.wait([blocked])
    assert order.ran == ["prefetch", "demand"]


def open_once_dropped(cpu: CpuDevice, gate: Gate) -> None:
    """Opens the gate when nothing waits for the link any more; after ten seconds in any case, so that a test ends."""
    deadline_s = time.monotonic() + 10
    while (cpu._link.queue or cpu._link.second) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    gate.open()


def test_draining_waits_for_what_has_begun_and_drops_the_rest(cpu: CpuDevice) -> None:
    gate = Gate()
    held = cpu.copy(gate.hold, ())
    for prefetch in (False, True):
        cpu.copy(gate.note("dropped"), (), prefetch=prefetch)
    cpu.flush()
    gate.wait_until_held()
    opener = threading.Thread(target=open_once_dropped, args=(cpu, gate))
    opener.start()
    cpu.drain()
    opener.join()
    assert held.done
    cpu.wait([cpu.copy(gate.note("next"), ())])
    assert gate.ran == ["next"]


def test_nothing_begins_before_it_is_flushed_and_an_unflushed_wait_flushes(cpu: CpuDevice) -> None:
    work = cpu.gpu(lambda: None, ())
    assert not work.done
    cpu.wait([work])
    assert work.done


def test_copies_that_end_are_told_while_waiting(cpu: CpuDevice) -> None:
    gate, calls = Gate(), []
    copy = cpu.copy(lambda: None, ())
    work = cpu.gpu(gate.hold, ())

    def told() -> None:
        calls.append(copy.done)
        gate.open()

    cpu.wait([work], told)
    assert calls[0] is True


def test_what_waits_for_failed_work_fails_with_its_error_and_does_not_run(cpu: CpuDevice) -> None:
    def fail() -> None:
        raise OSError("disk")

    ran: list[int] = []
    copy = cpu.copy(fail, ())
    first = cpu.gpu(lambda: ran.append(1), [copy])
    second = cpu.copy(lambda: ran.append(2), [first])
    with pytest.raises(OSError, match="disk"):
        cpu.wait([second])
    assert not ran


def test_work_that_has_run_keeps_no_tensors(cpu: CpuDevice) -> None:
    big = bytearray(8)
    work = cpu.gpu(lambda: big.append(1), [cpu.copy(lambda: None, ())])
    cpu.wait([work])
    assert work.after == ()
    assert work.chunks == ()


def lane_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("moetwin"))


def affinities() -> dict[int, set[int]]:
    """Cores of every thread of this process."""
    cores = {}
    for task in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # it has ended
            cores[task] = os.sched_getaffinity(task)
    return cores


needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to pin threads to"
)


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@needs_two_cores
@pytest.mark.parametrize("fails", [False, True])
def test_closing_gives_back_threads_and_cores(fails: bool, two_torch_threads: None) -> None:
    before = affinities()
    device = CpuDevice()
    assert lane_threads() == ["moetwin-cpu", "moetwin-gpu", "moetwin-link"]
    lanes = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("moetwin")}
    assert len(os.sched_getaffinity(0)) == 1
    assert torch.get_num_threads() == 1
    works = [device.gpu(lambda: 1 / 0 if fails else None, ()) for _ in range(3)]
    if fails:
        with pytest.raises(ZeroDivisionError):
            device.wait(works)
    device.copy(lambda: None, [Work("gpu", lambda: None)])  # waits for something that never comes
    device.flush()
    device.close()
    device.close()
    assert lane_threads() == []
    assert torch.get_num_threads() == 2
    after = {thread: cores for thread, cores in affinities().items() if thread not in lanes}  # they may still be dying
    assert after == {thread: before.get(thread, os.sched_getaffinity(0)) for thread in after}
    assert os.sched_getaffinity(0) == before[threading.get_native_id()]


@needs_two_cores
def test_a_thread_that_a_library_started_meanwhile_gets_its_cores_back() -> None:
    cores, stop, started = os.sched_getaffinity(0), threading.Event(), threading.Event()
    seen: list[int] = []

    def stay() -> None:
        seen.append(threading.get_native_id())
        started.set()
        stop.wait(10)

    with CpuDevice():
        thread = threading.Thread(target=stay)
        thread.start()
        assert started.wait(10)
        assert len(os.sched_getaffinity(seen[0])) == 1
    inherited = os.sched_getaffinity(seen[0])
    stop.set()
    thread.join()
    assert inherited == cores


def test_a_block_that_fails_closes_its_device() -> None:
    def work_and_fail(device: Device) -> None:
        device.cpu(lambda: time.sleep(0.01))
        device.flush()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_device("cpu") as device:
        work_and_fail(device)
    assert lane_threads() == []


def stress(device: Device, seed: int, *, ordered: bool) -> int:
    """Random copies into three slots, each read once: the number of reads that found something else.

    Copies take longer than reads, so that a read that does not wait for its copy comes first.
    """
    rng = np.random.default_rng(seed)
    buffer, count = slots(device, 3), 60
    seen = slots(device, count)
    sources = [source(device, float(number + 1)) for number in range(count)]
    reads: dict[int, list[Work]] = {slot: [] for slot in range(3)}

    def load(slot: int, number: int, seconds: float) -> None:
        pause(device, seconds)
        buffer[slot].copy_(sources[number], non_blocking=True)

    def read(slot: int, number: int, seconds: float) -> None:
        pause(device, seconds)
        seen[number].copy_(buffer[slot])

    for number in range(count):
        slot, slow, quick = int(rng.integers(3)), rng.uniform(2e-4, 1e-3), rng.uniform(0, 2e-4)
        after = reads[slot] if ordered else []
        copy = device.copy(lambda s=slot, n=number, t=slow: load(s, n, t), after, prefetch=bool(rng.random() < 0.3))
        waits = [copy] if ordered else []
        reads[slot] = [device.gpu(lambda s=slot, n=number, t=quick: read(s, n, t), waits)]
        if rng.random() < 0.3:
            device.flush()
    device.wait([work for works in reads.values() for work in works])
    device.drain()
    return int((seen[:, 0].cpu() != torch.arange(1.0, count + 1)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_no_race_under_random_delays(device: Device, seed: int) -> None:
    assert stress(device, seed, ordered=True) == 0


def test_a_race_is_found_when_nothing_waits(device: Device) -> None:
    assert stress(device, 0, ordered=False) > 0
