"""A CUDA GPU: streams for compute and copies, events between them, and a worker for the CPU's experts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial

import torch

from real.device import Chunks, Device, Run, Work
from traces.errors import InputError

PIECES = 2
"""Pieces of prefetches on their way at a time, one chunk together: while the link copies one, which takes 38 us for
2 MiB at 55 GB/s, the host has the time to hand over the next. Smaller ones would cost it more time than the link."""
POLL_S = 2e-5
"""How often the host looks for ended pieces while it waits for the CPU's experts, whose thread must have Python's lock
in between. Timers and threads make about 100 us of it, in which a link at 55 GB/s, but no slower one by half, comes to
the end of what it was handed."""
ANCHOR_S = 1.0
"""An event tells its time in float32 milliseconds since another one: that one must not lie far back."""
SAME_STRETCH_S = 2e-5
"""Chunks that follow each other this closely are one stretch of a copy."""


class Moment:
    """A point on a stream: an event, until its time is known. ``base`` is the event, and its time, to count from."""

    __slots__ = ("at_s", "base", "event")

    def __init__(self, event: torch.cuda.Event, base: tuple[torch.cuda.Event, float]) -> None:
        self.event: torch.cuda.Event | None = event
        self.base, self.at_s = base, 0.0

    def query(self) -> bool:
        """Whether it has come."""
        return self.event is None or self.event.query()


class CudaWork(Work):
    """Work on CUDA streams, with a moment at either end of each of its pieces; or, with a ``future``, on the CPU."""

    __slots__ = ("future", "moments")

    def __init__(self, resource: str, run: Run | Chunks, after: Sequence[Work] = (), *, yields: bool = False) -> None:
        super().__init__(resource, run, after, yields=yields)
        self.moments: list[tuple[Moment, Moment]] = []
        self.future: Future[None] | None = None

    @property
    def submitted(self) -> bool:
        """Whether all of it has been handed to a stream."""
        return self.begun == len(self.chunks)

    @property
    def done(self) -> bool:
        return self.finished or (self.future is None and self.submitted and self.moments[-1][1].query())


class CudaDevice(Device):
    """A CUDA GPU: compute on the stream that is current when it is opened, demand copies, prefetches and write-backs on
    one stream each, CPU experts on a worker beside them. Events order a computation after its copy, and a copy after
    the last read of its slot and what saves it.

    What is on a stream cannot be called back, and streams share the link, whatever their priority: so only
    :data:`PIECES` pieces of prefetches are handed over at a time, one chunk together, which is what a demand copy may
    have to wait for. The next ones follow as these end, when the host submits, flushes or waits; where there is nothing
    to hand over or to ask for, it waits without looking. What is left of a prefetch that is waited for goes to the
    stream of demand copies.
    """

    name = "cuda"
    joins_layers = False
    pieces = PIECES

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("device must be available, got cuda, and torch finds no CUDA device (try --device cpu)")
        self.torch_device = torch.device("cuda")
        least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._compute = torch.cuda.current_stream()
        self._demand = torch.cuda.Stream(priority=greatest)
        self._prefetch = torch.cuda.Stream(priority=least)
        self._back = torch.cuda.Stream(priority=least)
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moetwin-cpu")
        self._spare: list[torch.cuda.Event] = []  # a CUDA event costs more to make than to record
        self._open: list[CudaWork] = []
        self._marks: list[Moment] = []
        self._waiting: deque[CudaWork] = deque()  # prefetches that have not been handed over as a whole
        self._under_way: deque[tuple[Moment, CudaWork]] = deque()  # the ends of their pieces that have
        self._demands: deque[CudaWork] = deque()
        self._copied = False  # whether a copy has ended that nobody was told of
        self._base_s = time.perf_counter()
        self._base = self._anchor()

    def now_s(self) -> float:
        return time.perf_counter() - self._base_s

    def mark(self) -> Moment:
        mark = self._moment(self._compute)
        self._marks.append(mark)
        return mark

    def time_of(self, mark: Moment) -> float:
        return mark.at_s

    def gpu(self, run: Run, after: Sequence[Work]) -> Work:
        """Submits at once, in order: the stream waits for ``after``, and the host for nothing."""
        work = CudaWork("gpu", run)
        self._wait_on(self._compute, after)
        begin = self._moment(self._compute)
        run()
        work.moments.append((begin, self._moment(self._compute)))
        work.begun = 1
        work.chunks = (nothing,)  # a layer's tensors must not live until its times are read
        self._open.append(work)
        return work

    def copy(self, run: Run | Chunks, after: Sequence[Work], *, prefetch: bool = False) -> Work:
        """A demand copy is submitted as a whole, on a stream of its own; a prefetch piece by piece, as those end."""
        work = CudaWork("link", run, after, yields=prefetch)
        self._open.append(work)
        if prefetch:
            self._waiting.append(work)
            self.flush()
        else:
            self._submit(self._demand, work, len(work.chunks))
            self._demands.append(work)
        return work

    def save(self, run: Run, after: Sequence[Work]) -> Work:
        work = CudaWork("link-back", run, after)
        self._open.append(work)
        self._submit(self._back, work, 1)
        return work

    def cpu(self, run: Run) -> Work:
        work = CudaWork("cpu", run)
        work.future = self._pool.submit(self._on_pool, work)
        return work

    @property
    def cpu_threads(self) -> int:
        return self._pool.submit(torch.get_num_threads).result()

    def use_cpu_threads(self, count: int) -> None:
        self._pool.submit(torch.set_num_threads, count).result()  # of that thread, and of later ones in this process

    def promote(self, works: Sequence[Work]) -> None:
        for work in works:
            if isinstance(work, CudaWork):
                self._hand_over(work)

    def withdraw(self, works: Sequence[Work]) -> list[Work]:
        waiting = [work for work in self._waiting if not work.begun and work in works]
        for work in waiting:
            self._waiting.remove(work)
            self._open.remove(work)
        return [*waiting]

    def flush(self) -> None:
        """Tops up the pieces of prefetches that are under way to :data:`PIECES`, the oldest prefetch first."""
        while self._under_way and self._under_way[0][0].query():
            self._copied |= self._under_way.popleft()[1].done
        while self._waiting and len(self._under_way) < PIECES:
            work = self._waiting[0]
            self._submit(self._prefetch, work, 1)
            self._under_way.append((work.moments[-1][1], work))
            if work.submitted:
                self._waiting.popleft()

    def wait(self, works: Sequence[Work], on_copy: Callable[[], None] | None = None) -> None:
        """Makes later compute wait for copies, on the GPU; the host itself waits for its own experts alone."""
        if on_copy is not None:
            on_copy()
        self.flush()
        for work in works:
            if isinstance(work, CudaWork) and work.future is not None:
                self._await(partial(_ended, work.future), work.future.result, on_copy)
            elif work.resource != "gpu":  # which is in order with later compute as it is
                self._wait_on(self._compute, (work,))
            if work.error is not None:
                raise work.error

    def await_compute(self, on_copy: Callable[[], None] | None = None) -> None:
        self._await(self._compute.query, self._compute.synchronize, on_copy)

    def settle(self) -> None:
        self.await_compute()
        self.flush()
        while self._demands and self._demands[0].done:
            self._demands.popleft()
        for mark in self._marks:
            self._tell(mark)
        self._marks.clear()
        open_works, self._open = self._open, []
        for work in open_works:
            if work.done:
                self._note(work)
            else:  # a prefetch that nobody waits for yet
                self._open.append(work)
        if self.now_s() - self._base[1] > ANCHOR_S:
            self._base = self._anchor()

    def drain(self) -> None:
        self._open = [work for work in self._open if work.submitted]
        self._waiting.clear()
        self._pool.submit(nothing).result()  # the pool has one thread: everything before this has ended
        torch.cuda.synchronize()
        self.settle()

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._pool.shutdown()
        torch.set_num_threads(self._torch_threads)

    def _submit(self, stream: torch.cuda.Stream, work: CudaWork, count: int) -> None:
        """Hands the next ``count`` chunks to a stream, after what the work has to wait for."""
        if not work.begun:
            self._wait_on(stream, work.after)
            work.after = ()
        with torch.cuda.stream(stream):
            begin = self._moment(stream)
            try:
                for run in work.chunks[work.begun : work.begun + count]:
                    work.begun += 1
                    run()
            except BaseException as error:
                work.error, work.chunks = error, work.chunks[: work.begun]
                raise
            finally:
                work.moments.append((begin, self._moment(stream)))

    def _hand_over(self, work: CudaWork) -> None:
        """Makes a demand of what is left of a prefetch, which goes on after the chunks that are under way."""
        if work.submitted or work not in self._waiting:
            return
        self._waiting.remove(work)
        if work.moments and (last := work.moments[-1][1].event) is not None:
            self._demand.wait_event(last)
        self._submit(self._demand, work, len(work.chunks) - work.begun)
        self._demands.append(work)

    def _await(self, over: Callable[[], bool], block: Callable[[], None], on_copy: Callable[[], None] | None) -> None:
        """Waits by ``block``, or, while there are prefetches to hand over or to ask for, until ``over``."""
        began_s, own_s = self.now_s(), 0.0
        while self._waiting or (on_copy is not None and (self._under_way or self._demands)):
            if self._has_news():
                own_s -= self.now_s()
                self._go_on(on_copy)
                own_s += self.now_s()
            if over():
                break
        else:
            block()
        self.waited_s += self.now_s() - began_s - own_s

    def _has_news(self) -> bool:
        """Whether a copy, or a piece of one, has ended since the host looked last."""
        pieces, demands = self._under_way, self._demands
        return bool((pieces and pieces[0][0].query()) or (demands and demands[0].done))

    def _go_on(self, on_copy: Callable[[], None] | None) -> None:
        """Hands over what the link has room for, and tells of copies that have ended."""
        self.flush()
        while self._demands and self._demands[0].done:
            self._demands.popleft()
            self._copied = True
        if self._copied and on_copy is not None:
            self._copied = False
            on_copy()

    def _wait_on(self, stream: torch.cuda.Stream, after: Sequence[Work]) -> None:
        for earlier in after:
            if not isinstance(earlier, CudaWork) or earlier.finished:
                continue
            self._hand_over(earlier)  # else its last event would be none yet, and waiting for it nothing
            if earlier.future is not None:
                earlier.future.result()  # no stream can wait for the pool
            elif not earlier.done and (last := earlier.moments[-1][1].event) is not None:
                stream.wait_event(last)

    def _moment(self, stream: torch.cuda.Stream) -> Moment:
        """Now, on a stream."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return Moment(event, self._base)

    def _anchor(self) -> tuple[torch.cuda.Event, float]:
        """An event with the host's time of it: moments counted from it stay on the host's clock, and precise."""
        self._compute.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._compute)
        event.synchronize()
        return event, self.now_s()

    def _note(self, work: CudaWork) -> None:
        """Reads a work's times."""
        for begin, end in work.moments:
            self._tell(begin)
            self._tell(end)
        stretches = _joined([(begin.at_s, end.at_s) for begin, end in work.moments])
        work.start_s, work.end_s = stretches[0][0], stretches[-1][1]
        work.stretches = stretches if len(stretches) > 1 else ()
        work.chunks, work.begun, work.moments = (), 0, []
        work.finished = True

    def _tell(self, moment: Moment) -> None:
        """Reads a moment's time, and takes its event back."""
        if moment.event is None:
            return
        base, base_s = moment.base
        moment.at_s = base_s + base.elapsed_time(moment.event) / 1e3
        self._spare.append(moment.event)
        moment.event = None

    def _on_pool(self, work: CudaWork) -> None:
        with torch.inference_mode():
            work.execute(self.now_s, never)
        work.finished = True


def nothing() -> None:
    """What is left of work that has run."""


def _ended(future: Future[None]) -> bool:
    """Whether it has ended, after :data:`POLL_S` at the most."""
    return bool(wait_for((future,), POLL_S).done)


def never(work: Work) -> bool:
    """Work on the pool makes way for none."""
    return False


def _joined(pieces: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretches of time, of pieces in their order: those that follow each other closely are one."""
    stretches = [pieces[0]]
    for start_s, end_s in pieces[1:]:
        begun_s, last_s = stretches[-1]
        if start_s - last_s <= SAME_STRETCH_S:
            stretches[-1] = (begun_s, max(last_s, end_s))
        else:
            stretches.append((start_s, end_s))
    return stretches
