"""A CUDA GPU: streams for compute and copies, events between them, and a worker for the CPU's experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from real.device import Device, Work, nothing
from traces.errors import InputError


class CudaWork(Work):
    """Work on a CUDA stream, with an event at either end."""

    __slots__ = ("begin", "end", "future")

    def __init__(self, resource: str, run: Callable[[], None]) -> None:
        super().__init__(resource, run)
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.future: Future[None] | None = None

    @property
    def done(self) -> bool:
        return self.finished or (self.future is None and self.end.query())


class CudaDevice(Device):
    """A CUDA GPU: compute on the current stream, demand copies, prefetches and write-backs on one stream each, CPU
    experts on a worker beside them. Events order a computation after its copy, and a copy after the last read of its
    slot and what saves it."""

    name = "cuda"
    joins_layers = False

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("device must be available, got cuda, and torch finds no CUDA device (try --device cpu)")
        self.torch_device = torch.device("cuda")
        least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._demand = torch.cuda.Stream(priority=greatest)
        self._prefetch = torch.cuda.Stream(priority=least)
        self._back = torch.cuda.Stream(priority=least)
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
        return self._on(torch.cuda.current_stream(), "gpu", run, after)

    def copy(self, run: Callable[[], None], after: Sequence[Work], *, prefetch: bool = False) -> Work:
        return self._on(self._prefetch if prefetch else self._demand, "link", run, after)

    def save(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        return self._on(self._back, "link-back", run, after)

    def cpu(self, run: Callable[[], None]) -> Work:
        work = CudaWork("cpu", run)
        work.future = self._pool.submit(self._on_pool, work)
        return work

    def promote(self, works: Sequence[Work]) -> None:
        """Nothing to do: what was submitted to a stream cannot be reordered."""

    def flush(self) -> None:
        """Nothing to do: streams begin at once."""

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None] | None = None) -> None:
        if on_copy is not None:
            on_copy()
        for work in works:
            if isinstance(work, CudaWork) and work.future is not None:
                work.future.result()
            if work.error is not None:
                raise work.error

    def settle(self) -> None:
        torch.cuda.current_stream().synchronize()
        open_works, self._open = self._open, []
        for work in open_works:
            if not work.done:  # a prefetch that nobody waits for yet
                self._open.append(work)
                continue
            work.start_s, work.end_s = self.time_of(work.begin), self.time_of(work.end)
            work.finished = True

    def drain(self) -> None:
        self._pool.submit(nothing).result()  # the pool has one thread: everything before this has ended
        torch.cuda.synchronize()
        self.settle()

    def close(self) -> None:
        torch.cuda.synchronize()
        self._pool.shutdown()

    def _on(self, stream: torch.cuda.Stream, resource: str, run: Callable[[], None], after: Sequence[Work]) -> Work:
        work = CudaWork(resource, nothing)
        with torch.cuda.stream(stream):
            for earlier in after:
                if isinstance(earlier, CudaWork) and not earlier.done:
                    stream.wait_event(earlier.end)
            work.begin.record()
            run()
            work.end.record()
        self._open.append(work)
        return work

    def _on_pool(self, work: CudaWork) -> None:
        with torch.inference_mode():
            work.execute(self.now_s)
        work.finished = True
