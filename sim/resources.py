"""The resources of the simulated clock: each does one job at a time, in an order of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sim.logs import LayerRecord
from sim.plan import Operation

if TYPE_CHECKING:
    from sim.queues import Queues

ROUNDING_S = 1e-12
"""A copy that is this close to the end of a chunk has reached it."""


class Job:
    """Work for one resource: a dense part, a group of expert kernels, or a transfer.

    ``parts_s`` splits ``duration_s`` over ``operations``; a job without operations names what it waits for in
    ``after``. ``counted`` is for how many pieces of work the host waits when it waits for all; ``rest_s`` is what is
    left of a copy that yields at the end of a chunk, and has then ``begun``; ``ends_with`` is the layer that ends no
    sooner than the job.
    """

    __slots__ = (
        "after",
        "begun",
        "counted",
        "duration_s",
        "ends_with",
        "kind",
        "operations",
        "parts_s",
        "record",
        "rest_s",
    )

    def __init__(
        self,
        kind: str,
        record: LayerRecord,
        parts_s: Sequence[float],
        operations: Sequence[Operation] = (),
        counted: int = 0,
    ) -> None:
        self.kind, self.record, self.operations, self.parts_s = kind, record, operations, parts_s
        self.ends_with = record
        self.duration_s = parts_s[0] if len(parts_s) == 1 else sum(parts_s)
        self.after: tuple[int, ...] = operations[0].after if operations else ()
        self.counted, self.rest_s, self.begun = counted, 0.0, False


class Resource:
    """Does one job at a time, at a rate that depends on what else is busy; jobs begin in order of submission.

    ``second`` is a queue that is served only while nothing of the first can begin: that of prefetches.
    """

    rank: ClassVar[int] = -2
    """SimPy's priority of the end of a job: what ends at the same instant ends in this order, and before the host,
    whose priority is 1, goes on."""
    yields = False
    """Whether what waits may cut short what runs."""

    def __init__(self, queues: Queues, name: str) -> None:
        self.queues, self.env, self.name = queues, queues.env, name
        self.queue, self.second = deque[Job](), deque[Job]()
        self.job: Job | None = None
        self.start_s = 0.0
        self._left_s = self._since_s = 0.0
        self._rate = 1.0
        self._timer: Any = None

    @property
    def outstanding(self) -> int:
        """Jobs submitted and not ended."""
        return len(self.queue) + len(self.second) + (self.job is not None)

    def promote(self, waited: set[int]) -> None:
        """Prefetches that are among the operations now ``waited`` for need not stand back any longer."""
        for job in [job for job in self.second if job.operations[0].id in waited]:
            self.second.remove(job)
            self.queue.append(job)

    def next_job(self) -> Job | None:
        """Takes the next job that may begin from its queue, or None."""
        for queue in (self.queue, self.second):
            if queue and self.queues.pending.isdisjoint(queue[0].after):
                return queue.popleft()
        return None

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
        self._settle()
        self._rate = rate
        self._arm()

    def _settle(self) -> None:
        """Brings the work that is left up to date."""
        now = self.env.now
        self._left_s = max(0.0, self._left_s - (now - self._since_s) * self._rate)
        self._since_s = now

    def _arm(self) -> None:
        self._timer = timer = self.env.event()
        timer._ok, timer._value = True, None  # as SimPy's own Timeout is made, which has no priority
        timer.callbacks.append(self._ring)
        self.env.schedule(timer, self.rank, self._left_s / self._rate)

    def _ring(self, event: Any) -> None:
        """The job has ended, unless its rate has changed since this timer was set."""
        if event is not self._timer or self.job is None:
            return
        job, self.job, self._timer = self.job, None, None
        self.queues.ended(self, job)


class Gpu(Resource):
    """Runs dense parts and experts strictly in order; neighbours that are ready make one job, one SimPy event."""

    def next_job(self) -> Job | None:
        queue, pending, awaited = self.queue, self.queues.pending, self.queues.awaited
        if not queue or not pending.isdisjoint(queue[0].after):
            return None
        job = queue.popleft()
        if not queue or not job.operations:
            return job
        operations, parts_s = [*job.operations], [*job.parts_s]
        while queue and operations[-1].id not in awaited:
            follower = queue[0]
            if not follower.operations or not pending.isdisjoint(follower.after):
                break
            queue.popleft()
            operations.extend(follower.operations)
            parts_s.extend(follower.parts_s)
        return job if len(parts_s) == 1 else Job(job.kind, job.record, parts_s, operations, len(parts_s))


class Link(Resource):
    """Copies from host to device, prefetches second. With chunks, one of these makes way for a demand between two."""

    rank = -1  # so that at one instant it sees what all others have finished

    def __init__(self, queues: Queues, chunk_s: float) -> None:
        """``chunk_s`` is what one chunk takes; 0: copies are whole."""
        super().__init__(queues, "link")
        self._chunk_s, self.yields = chunk_s, chunk_s > 0.0
        self._waited: set[int] = set()

    def promote(self, waited: set[int]) -> None:
        super().promote(waited)
        self._waited = waited

    def advance(self) -> None:
        super().advance()
        if self.yields and self.queue and self.job is not None and self.job.kind == "prefetch":
            self._make_way(self.job)

    def _make_way(self, job: Job) -> None:
        """Ends ``job`` with the chunk that is under way, unless it is being waited for itself."""
        ready = self.queues.pending.isdisjoint(self.queue[0].after)
        if job.rest_s or not ready or job.operations[0].id in self._waited:
            return
        self._settle()
        done_s = job.duration_s - self._left_s
        chunks = max(1, -int((ROUNDING_S - done_s) // self._chunk_s))
        rest_s = job.duration_s - chunks * self._chunk_s
        if rest_s > ROUNDING_S:
            job.rest_s = rest_s
            job.duration_s -= rest_s
            job.parts_s = (job.duration_s,)
            self._left_s = max(0.0, self._left_s - rest_s)
            self._arm()
