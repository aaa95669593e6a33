"""GPU, link and CPU of the simulated clock: each does one job at a time, in an order of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sim.logs import LayerRecord
from sim.plan import Operation

if TYPE_CHECKING:
    from sim.queues import Queues


class Job:
    """Work for one resource: a dense part, a group of expert kernels, or a copy.

    ``parts_s`` splits ``duration_s`` over ``operations``; a job without operations names what it waits for in
    ``after``.
    """

    __slots__ = ("after", "duration_s", "kind", "operations", "parts_s", "record")

    def __init__(
        self, kind: str, record: LayerRecord, parts_s: Sequence[float], operations: Sequence[Operation] = ()
    ) -> None:
        self.kind, self.record, self.operations, self.parts_s = kind, record, operations, parts_s
        self.duration_s = parts_s[0] if len(parts_s) == 1 else sum(parts_s)
        self.after: tuple[int, ...] = operations[0].after if operations else ()


class Resource(ABC):
    """Does one job at a time, at a rate that depends on what else is busy."""

    name: str

    def __init__(self, queues: Queues) -> None:
        self.queues, self.env = queues, queues.env
        self.job: Job | None = None
        self.start_s = 0.0
        self._left_s = self._since_s = 0.0
        self._rate = 1.0
        self._timer: Any = None

    @abstractmethod
    def next_job(self) -> Job | None:
        """Takes the next job that may begin from the queue, or None."""

    def advance(self) -> None:
        """Starts the next job, unless one is running or none may begin."""
        if self.job is not None:
            return
        job = self.next_job()
        if job is None:
            return
        self.job, self._left_s, self._rate = job, job.duration_s, 1.0
        self.start_s = self._since_s = self.env.now
        if self.queues.contended:
            self.queues.busy_changed()
        if self._timer is None:
            self._arm()

    def rerate(self, rate: float) -> None:
        """From now on the job advances by ``rate`` seconds of work a second."""
        if rate == self._rate:
            return
        now = self.env.now
        self._left_s = max(0.0, self._left_s - (now - self._since_s) * self._rate)
        self._since_s, self._rate = now, rate
        self._arm()

    def _arm(self) -> None:
        self._timer = self.env.timeout(self._left_s / self._rate)
        self._timer.callbacks.append(self._ring)

    def _ring(self, event: Any) -> None:
        """The job has ended, unless its rate has changed since this timer was set."""
        if event is not self._timer or self.job is None:
            return
        job, self.job, self._timer = self.job, None, None
        self.queues.ended(self, job)


class Gpu(Resource):
    """Runs dense parts and experts strictly in order; neighbours that are ready make one job, one SimPy event."""

    name = "gpu"

    def __init__(self, queues: Queues) -> None:
        super().__init__(queues)
        self.queue: deque[Job] = deque()

    def next_job(self) -> Job | None:
        queue, pending, awaited = self.queue, self.queues.pending, self.queues.awaited
        if not queue or not pending.isdisjoint(queue[0].after):
            return None
        job = queue.popleft()
        operations, parts_s = [*job.operations], [*job.parts_s]
        while queue and operations and operations[-1].id not in awaited:
            follower = queue[0]
            if not follower.operations or not pending.isdisjoint(follower.after):
                break
            queue.popleft()
            operations.extend(follower.operations)
            parts_s.extend(follower.parts_s)
        return job if len(parts_s) == 1 else Job(job.kind, job.record, parts_s, operations)


class Link(Resource):
    """Copies from host to device: demand first, then prefetches, each in order of submission."""

    name = "link"

    def __init__(self, queues: Queues) -> None:
        super().__init__(queues)
        self.demand: deque[Job] = deque()
        self.prefetch: deque[Job] = deque()

    @property
    def outstanding(self) -> int:
        """Copies submitted and not ended."""
        return len(self.demand) + len(self.prefetch) + (self.job is not None)

    def promote(self, copies: set[int]) -> None:
        """Queued prefetches that are now being waited for become demand copies."""
        for job in [job for job in self.prefetch if job.operations[0].id in copies]:
            self.prefetch.remove(job)
            self.demand.append(job)

    def next_job(self) -> Job | None:
        for queue in (self.demand, self.prefetch):
            if queue and self.queues.pending.isdisjoint(queue[0].after):
                return queue.popleft()
        return None


class Cpu(Resource):
    """The CPU's expert pool: one expert after the other, each on all the pool's threads."""

    name = "cpu"

    def __init__(self, queues: Queues) -> None:
        super().__init__(queues)
        self.queue: deque[Job] = deque()

    def next_job(self) -> Job | None:
        return self.queue.popleft() if self.queue else None
