"""This machine's CPU in the GPU's role: one thread each for what a GPU, its link and the CPU's experts do."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from real.device import Chunks, Device, Run, Work


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
        self.busy = False
        self._thread = threading.Thread(target=self._loop, name=f"moetwin-{name}", daemon=True)
        self._thread.start()

    def next_ready(self) -> bool:
        """Whether the head of either queue may begin."""
        return bool((self.queue and self.queue[0].ready) or (self.second and self.second[0].ready))

    def drop(self) -> None:
        """Forgets what has not begun."""
        self.queue.clear()
        self.second.clear()

    def join(self) -> None:
        """Waits for the thread's end; the device must be closing."""
        self._thread.join()

    def makes_way(self, work: Work) -> bool:
        """Whether ``work``, a prefetch between two chunks, has to let a demand copy pass, or to end here."""
        with self.device.lock:
            waiting = bool(self.queue and self.queue[0].ready)
            return self.device.draining or (work.yields and waiting)

    def set_aside(self, work: Work) -> None:
        """Puts back what has made way: a prefetch that is waited for by now goes on first."""
        if not self.device.draining:
            (self.second if work.yields else self.queue).appendleft(work)

    def _take(self) -> Work | None:
        while not self.next_ready():
            if self.device.closing:
                return None
            self.idle = True
            self.bell.wait()
        self.idle, self.busy = False, True
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
                over = work.execute(device.now_s, self.makes_way)
                with device.lock:
                    self.busy = False
                    if not over:
                        self.set_aside(work)
                    device.stopped(self, work, over)
                del work  # else this thread would keep it, and its error's tensors, until the next one comes


class CpuDevice(Device):
    """This CPU in the GPU's role: slots are ordinary buffers, a copy is a real memcpy on a thread of its own, and
    so is one back to the host, and GPU-role and CPU-role experts run on one thread each. Nothing is slept or faked; it
    is calibrated like any machine.

    One torch thread a role. Host and GPU role, which take turns, share a core; link, CPU pool and the way back get the
    next ones.
    """

    name = "cpu"
    joins_layers = True

    def __init__(self, *, pin: bool = True) -> None:
        self.torch_device = torch.device("cpu")
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pinned = pin and len(self._cores) > 1
        self._opener, self._others = threading.get_native_id(), _thread_ids()
        self._base_s = time.perf_counter()
        self.lock = threading.Lock()
        self.closing = self.draining = False
        self._host = threading.Condition(self.lock)
        self._wanted: Callable[[], bool] | None = None
        self._copies_ended = self._copies_seen = 0
        cores = [self._cores[min(place, len(self._cores) - 1)] if self._pinned else None for place in range(4)]
        _pin_thread(cores[0])
        self._gpu, self._link, self._cpu = self._lanes = [
            Lane(self, *role) for role in zip(("gpu", "link", "cpu"), cores, strict=False)
        ]
        self._back: Lane | None = None  # made when it is first wanted: few systems write back
        self._back_core = cores[-1]

    def now_s(self) -> float:
        return time.perf_counter() - self._base_s

    def mark(self) -> float:
        return self.now_s()

    def time_of(self, mark: float) -> float:
        return mark

    def gpu(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        work = Work("gpu", run, after)
        self._gpu.queue.append(work)
        return work

    def copy(self, run: Run | Chunks, after: Sequence[Work], *, prefetch: bool = False) -> Work:
        work = Work("link", run, after, yields=prefetch)
        (self._link.second if prefetch else self._link.queue).append(work)
        return work

    def save(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        work = Work("link-back", run, after)
        if self._back is None:
            with self.lock:
                self._back = Lane(self, "link-back", self._back_core)
                self._lanes.append(self._back)
        self._back.queue.append(work)
        return work

    def cpu(self, run: Callable[[], None]) -> Work:
        work = Work("cpu", run)
        self._cpu.queue.append(work)
        return work

    def promote(self, works: Sequence[Work]) -> None:
        with self.lock:
            for work in works:
                work.yields = False
                if work in self._link.second:
                    self._link.second.remove(work)
                    self._link.queue.append(work)

    def withdraw(self, works: Sequence[Work]) -> list[Work]:
        with self.lock:
            waiting = [work for work in self._link.second if not work.begun and work in works]
            for work in waiting:
                self._link.second.remove(work)
        return waiting

    def flush(self) -> None:
        with self.lock:
            self._ring()

    def stopped(self, lane: Lane, work: Work, over: bool) -> None:
        """A lane has done ``work``, or one or more of its chunks; called with the lock held."""
        work.finished = over
        if over and lane is self._link:
            self._copies_ended += 1
        self._ring()
        if self._wanted is not None and self._wanted():
            self._host.notify()

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None] | None = None) -> None:
        def done() -> bool:
            return all(work.finished for work in works)

        def news() -> bool:
            return done() or (on_copy is not None and self._copies_ended != self._copies_seen)

        self.flush()
        over = False
        while not over:
            began_s = self.now_s()
            with self.lock:
                self._sleep_until(news)
                self.waited_s += self.now_s() - began_s
                over, copied = done(), self._copies_ended != self._copies_seen
                self._copies_seen = self._copies_ended
            if copied and on_copy is not None:
                on_copy()
                self.flush()
        for work in works:
            if work.error is not None:
                raise work.error

    def settle(self) -> None:
        """Nothing to do: whoever marks a time has waited for the work before it."""

    def drain(self) -> None:
        with self.lock:
            for lane in self._lanes:
                lane.drop()
            self.draining = True
            try:
                self._sleep_until(lambda: not any(lane.busy for lane in self._lanes))
            finally:
                self.draining = False

    def close(self) -> None:
        if self.closing:
            return
        self.drain()
        with self.lock:
            self.closing = True
            for lane in self._lanes:
                lane.bell.notify()
        for lane in self._lanes:
            lane.join()
        torch.set_num_threads(self._torch_threads)
        if self._pinned:
            self._unpin()

    def _sleep_until(self, wanted: Callable[[], bool]) -> None:
        """Lets the host wait, with the lock held, until ``wanted`` holds when a piece of work ends."""
        self._wanted = wanted
        try:
            while not wanted():
                self._host.wait()
        finally:
            self._wanted = None

    def _unpin(self) -> None:
        """Gives the opening thread its cores back, and threads that libraries started from it in the meantime."""
        core = {self._cores[0]}
        for thread in (self._opener, *sorted(_thread_ids() - self._others)):
            with suppress(ProcessLookupError):  # it has ended
                if os.sched_getaffinity(thread) == core:
                    os.sched_setaffinity(thread, self._cores)

    def _ring(self) -> None:
        for lane in self._lanes:
            if lane.idle and lane.next_ready():
                lane.idle = False
                lane.bell.notify()


def _pin_thread(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(threading.get_native_id(), {core})


def _thread_ids() -> set[int]:
    """Native ids of this process's threads, where the system tells."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.is_dir() else set()
