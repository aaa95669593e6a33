"""Two devices behind one face: a CUDA GPU, and this machine's CPU in the same role.

Work is submitted without waiting. A piece of work waits for the pieces named in ``after`` and carries the times at
which it really ran. Times are seconds since the device was opened.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from traces.errors import InputError


class Work:
    """Something submitted to a device. ``start_s`` and ``end_s`` hold once it is done."""

    __slots__ = ("after", "end_s", "error", "finished", "is_copy", "run", "start_s")

    def __init__(self, run: Callable[[], None], after: Sequence[Work], *, is_copy: bool = False) -> None:
        self.run, self.after, self.is_copy = run, after, is_copy
        self.finished = False
        self.error: BaseException | None = None
        self.start_s = self.end_s = 0.0

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finished

    @property
    def ready(self) -> bool:
        """Whether everything it waits for has been done."""
        return all(work.done for work in self.after)


class Device(Protocol):
    """What the executor needs. ``joins_layers``: the caller has to wait for a layer's work before using its output."""

    name: str
    torch_device: torch.device
    joins_layers: bool

    def now_s(self) -> float:
        """The device's clock, as the host reads it."""

    def mark(self) -> Any:
        """A point on the compute timeline; :meth:`time_of` turns it into seconds after :meth:`settle`."""

    def time_of(self, mark: Any) -> float:
        """Seconds of a mark."""

    def gpu(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        """Compute in the GPU's role; pieces run in order of submission."""

    def copy(self, run: Callable[[], None], after: Sequence[Work], *, prefetch: bool = False) -> Work:
        """A copy from host to device; demand copies go before prefetches that have not begun."""

    def cpu(self, run: Callable[[], None]) -> Work:
        """Compute on the CPU's expert pool."""

    def promote(self, works: Sequence[Work]) -> None:
        """Prefetches that are now waited for become demand copies, where they have not begun."""

    def flush(self) -> None:
        """Lets everything submitted since the last flush begin."""

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None]) -> None:
        """Returns when ``works`` are done (or ordered before all later compute); calls ``on_copy`` as copies end."""

    def settle(self) -> None:
        """Waits until everything is done and all times are known."""

    def close(self) -> None:
        """Ends threads, and gives back what was changed."""


class Lane:
    """A worker thread of the CPU device with its queue; pieces run one at a time, in order of submission.

    ``second`` is a queue that is served only while nothing of the first can begin.
    """

    def __init__(self, device: CpuDevice, name: str, core: int | None) -> None:
        self.device, self.name, self._core = device, name, core
        self.queue: deque[Work] = deque()
        self.second: deque[Work] = deque()
        self.bell = threading.Condition(device.lock)
        self.idle = True
        self._thread = threading.Thread(target=self._loop, name=f"moetwin-{name}", daemon=True)
        self._thread.start()

    def next_ready(self) -> bool:
        """Whether the head of either queue may begin."""
        return bool((self.queue and self.queue[0].ready) or (self.second and self.second[0].ready))

    def join(self) -> None:
        """Waits for the thread's end; the device must be closing."""
        self._thread.join()

    def _take(self) -> Work | None:
        while not self.next_ready():
            if self.device.closing:
                return None
            self.idle = True
            self.bell.wait()
        self.idle = False
        queue = self.queue if self.queue and self.queue[0].ready else self.second
        return queue.popleft()

    def _loop(self) -> None:
        torch.set_num_threads(1)
        _pin_thread(self._core)
        device = self.device
        with torch.inference_mode():
            while True:
                with device.lock:
                    work = self._take()
                if work is None:
                    return
                work.start_s = device.now_s()
                try:
                    work.run()
                except BaseException as error:
                    work.error = error
                work.end_s = device.now_s()
                with device.lock:
                    device.finished(self, work)


class CpuDevice:
    """This CPU in the GPU's role: slots are ordinary buffers, a copy is a real memcpy on a thread of its own, and
    GPU-role and CPU-role experts run on one thread each. Nothing is slept or faked; it is calibrated like any machine.

    One torch thread a role. Host and GPU role, which take turns, share a core; link and CPU pool get the next ones.
    """

    name = "cpu"
    joins_layers = True

    def __init__(self, *, pin: bool = True) -> None:
        self.torch_device = torch.device("cpu")
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pinned = pin and len(self._cores) > 1
        self._base_s = time.perf_counter()
        self.lock = threading.Lock()
        self.closing = False
        self._host = threading.Condition(self.lock)
        self._awaited: Sequence[Work] = ()
        self._copies_ended = 0
        cores = [self._cores[min(place, len(self._cores) - 1)] if self._pinned else None for place in range(3)]
        _pin_thread(cores[0])
        self._gpu, self._link, self._cpu = (
            Lane(self, *role) for role in zip(("gpu", "link", "cpu"), cores, strict=True)
        )
        self._lanes = (self._gpu, self._link, self._cpu)

    def now_s(self) -> float:
        return time.perf_counter() - self._base_s

    def mark(self) -> float:
        return self.now_s()

    def time_of(self, mark: float) -> float:
        return mark

    def gpu(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        work = Work(run, after)
        self._gpu.queue.append(work)
        return work

    def copy(self, run: Callable[[], None], after: Sequence[Work], *, prefetch: bool = False) -> Work:
        work = Work(run, after, is_copy=True)
        (self._link.second if prefetch else self._link.queue).append(work)
        return work

    def cpu(self, run: Callable[[], None]) -> Work:
        work = Work(run, ())
        self._cpu.queue.append(work)
        return work

    def promote(self, works: Sequence[Work]) -> None:
        with self.lock:
            for work in works:
                if work in self._link.second:
                    self._link.second.remove(work)
                    self._link.queue.append(work)

    def flush(self) -> None:
        with self.lock:
            self._ring()

    def finished(self, lane: Lane, work: Work) -> None:
        """A lane has done ``work``; called with the lock held."""
        work.finished = True
        if lane is self._link:
            self._copies_ended += 1
        self._ring()
        if self._awaited and (lane is self._link or all(work.done for work in self._awaited)):
            self._host.notify()

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None]) -> None:
        seen = self._copies_ended
        self.flush()
        while True:
            with self.lock:
                self._awaited = works
                while not (done := all(work.done for work in works)) and seen == self._copies_ended:
                    self._host.wait()
                self._awaited, ended = (), self._copies_ended
            if ended != seen:
                seen = ended
                on_copy()
            if done:
                break
        for work in works:
            if work.error is not None:
                raise work.error

    def settle(self) -> None:
        """Nothing to do: a piece of work knows its times when it is done."""

    def close(self) -> None:
        with self.lock:
            self.closing = True
            for lane in self._lanes:
                lane.bell.notify()
        for lane in self._lanes:
            lane.join()
        torch.set_num_threads(self._threads)
        if self._pinned:
            os.sched_setaffinity(0, self._cores)

    def _ring(self) -> None:
        for lane in self._lanes:
            if lane.idle and lane.next_ready():
                lane.idle = False
                lane.bell.notify()


class CudaWork(Work):
    """Work on a CUDA stream, with an event at either end."""

    __slots__ = ("begin", "end", "future")

    def __init__(self, *, is_copy: bool = False) -> None:
        super().__init__(_nothing, (), is_copy=is_copy)
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.future: Future[None] | None = None

    @property
    def done(self) -> bool:
        return self.finished or (self.future is None and self.end.query())


class CudaDevice:
    """A CUDA GPU: compute on the current stream, demand copies and prefetches on one stream each, CPU experts on a
    worker beside them. Events order a computation after its copy, and a copy after the last read of its slot."""

    name = "cuda"
    joins_layers = False

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("device must be available, got cuda, and torch finds no CUDA device (try --device cpu)")
        self.torch_device = torch.device("cuda")
        least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._demand = torch.cuda.Stream(priority=greatest)
        self._prefetch = torch.cuda.Stream(priority=least)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moetwin-cpu")
        self._open: list[CudaWork] = []
        torch.cuda.synchronize()
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record()
        torch.cuda.synchronize()
        self._base_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._base_s

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time_of(self, mark: torch.cuda.Event) -> float:
        return self._base.elapsed_time(mark) / 1e3

    def gpu(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        return self._on(torch.cuda.current_stream(), run, after)

    def copy(self, run: Callable[[], None], after: Sequence[Work], *, prefetch: bool = False) -> Work:
        return self._on(self._prefetch if prefetch else self._demand, run, after, is_copy=True)

    def cpu(self, run: Callable[[], None]) -> Work:
        work = CudaWork()
        work.future = self._pool.submit(self._timed, work, run)
        return work

    def promote(self, works: Sequence[Work]) -> None:
        """Nothing to do: what was submitted to a stream cannot be reordered."""

    def flush(self) -> None:
        """Nothing to do: streams begin at once."""

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None]) -> None:
        on_copy()
        for work in works:
            if isinstance(work, CudaWork) and work.future is not None:
                work.future.result()

    def settle(self) -> None:
        torch.cuda.synchronize()
        for work in self._open:
            work.start_s, work.end_s = self.time_of(work.begin), self.time_of(work.end)
            work.finished = True
        self._open.clear()

    def close(self) -> None:
        torch.cuda.synchronize()
        self._pool.shutdown()

    def _on(
        self, stream: torch.cuda.Stream, run: Callable[[], None], after: Sequence[Work], *, is_copy: bool = False
    ) -> Work:
        work = CudaWork(is_copy=is_copy)
        with torch.cuda.stream(stream):
            for earlier in after:
                if isinstance(earlier, CudaWork) and not earlier.done:
                    stream.wait_event(earlier.end)
            work.begin.record()
            run()
            work.end.record()
        self._open.append(work)
        return work

    def _timed(self, work: CudaWork, run: Callable[[], None]) -> None:
        work.start_s = self.now_s()
        with torch.inference_mode():
            run()
        work.end_s = self.now_s()
        work.finished = True


def open_device(name: str = "auto") -> Device:
    """The device called ``name``: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or auto, got {name!r}")
    return CudaDevice() if name == "cuda" else CpuDevice()


def _pin_thread(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(threading.get_native_id(), {core})


def _nothing() -> None:
    """Work on a stream runs when it is submitted."""
