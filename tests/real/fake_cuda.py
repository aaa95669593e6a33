"""Streams and events that behave as CUDA's: what is submitted runs later, in any order that the waits allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch


class Mark:
    """What an event stands for when it is recorded: a place in a stream."""

    def __init__(self) -> None:
        self.at: int | None = None


class FakeStream:
    """A queue of work, which ``gpu`` runs; a wait for a place that has not come stops it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.queue: deque[Callable[[], None] | Mark] = deque()
        gpu.streams.append(self)

    def wait_event(self, event: FakeEvent) -> None:
        if event.mark is not None:  # an event that was never recorded stops nobody
            mark = event.mark
            self.queue.append(mark)

    def synchronize(self) -> None:
        while self.queue:
            assert self._gpu.step(), "a stream that is waited for waits for what never comes"

    def query(self) -> bool:
        self._gpu.step()
        return not self.queue

    def ready(self) -> bool:
        head = self.queue[0] if self.queue else None
        return head is not None and not (isinstance(head, Mark) and head.at is None)


class FakeEvent:
    """Tells when a stream has come to where it was recorded; it may be recorded again."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.mark: Mark | None = None

    def record(self, stream: FakeStream) -> None:
        mark = self.mark = Mark()
        stream.queue.append(lambda: self._gpu.reach(mark))

    def query(self) -> bool:
        self._gpu.step()
        return self.mark is None or self.mark.at is not None

    def synchronize(self) -> None:
        while not self.query():
            pass

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.mark is not None
        assert end.mark is not None
        assert self.mark.at is not None
        assert end.mark.at is not None, "an event that has not come has no time"
        return float(end.mark.at - self.mark.at)


class FakeGpu:
    """Runs its streams one piece at a time, each time a random one of those that can go on."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.streams: list[FakeStream] = []
        self.events = 0
        self.current = FakeStream(self)
        self._ticks = 0

    def step(self) -> bool:
        """Runs one piece, and tells whether there was one that could."""
        ready = [stream for stream in self.streams if stream.ready()]
        if ready:
            head = ready[int(self.rng.integers(len(ready)))].queue.popleft()
            self._ticks += 1
            if not isinstance(head, Mark):
                head()
        return bool(ready)

    def reach(self, mark: Mark) -> None:
        mark.at = self._ticks

    def enqueue(self, run: Callable[[], None]) -> None:
        """What a kernel or a copy does: it runs when its stream comes to it."""
        self.current.queue.append(run)

    def synchronize(self) -> None:
        while any(stream.queue for stream in self.streams):
            self.step()

    def empty_cache(self) -> None:
        """Nothing is kept."""

    def event(self, enable_timing: bool = False) -> FakeEvent:
        self.events += 1
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def torch(self) -> SimpleNamespace:
        """What of torch a CUDA device uses."""

        class Stream(FakeStream):
            def __init__(stream, priority: int = 0) -> None:  # noqa: N805 - self is the GPU
                super().__init__(self)

            @staticmethod
            def priority_range() -> tuple[int, int]:
                return 0, -5

        cuda = SimpleNamespace(
            is_available=lambda: True,
            current_stream=lambda: self.current,
            Stream=Stream,
            Event=self.event,
            stream=self.stream,
            synchronize=self.synchronize,
            empty_cache=self.empty_cache,
        )
        threads = {"get_num_threads": torch.get_num_threads, "set_num_threads": torch.set_num_threads}
        return SimpleNamespace(cuda=cuda, device=torch.device, inference_mode=torch.inference_mode, **threads)
