"""GPU, link and CPU as SimPy resources: an event for every transfer and every group of kernels."""

from __future__ import annotations

from collections.abc import Generator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from sim.costs import Costs
from sim.logs import LayerRecord
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.resources import Cpu, Gpu, Job, Link, Resource

if TYPE_CHECKING:
    from sim.engine import Engine

LINK_WINDOW = 2
"""Copies that may be outstanding before no further prefetch is asked for."""

Waits = Generator[Any, Any, None]
"""What a process yields: SimPy events to wait for."""


class Queues:
    """Queues work on the resources, and lets the host wait for it; ``env`` is the SimPy environment."""

    def __init__(self, engine: Engine, env: Any) -> None:
        self.env, self.pending, self.awaited = env, set[int](), set[int]()
        self.gpu, self.link, self.cpu = Gpu(self), Link(self), Cpu(self)
        self._controller, self._costs, self._log = engine.controller, engine.costs, engine.log
        self._resources = (self.gpu, self.link, self.cpu)
        self._rates = _rates(engine.costs)
        self.contended = is_contended(engine.costs)
        self._synchronous = engine.controller.system.synchronous
        self._unfinished = 0
        self._drained: Any = None
        self._arrived: list[Operation] = []
        self._record = LayerRecord(0, 0)

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return float(self.env.now)

    def sleep(self, seconds: float) -> Waits:
        """The host works for ``seconds``."""
        if seconds:
            yield self.env.timeout(seconds)

    def read_back(self, seconds: float) -> Waits:
        """The host reads the router's choice; the controller learns what has arrived by then."""
        yield from self.sleep(seconds)
        self._poll()

    def dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> Waits:
        """Dispatches a dense part, runs it after all that was submitted, and waits for its end."""
        yield from self.sleep(dispatch_s)
        self._unfinished += 1
        job = Job(kind, record, (duration_s,))
        job.after = tuple(job.operations[0].id for job in (*self.cpu.queue, self.cpu.job) if job is not None)
        self.gpu.queue.append(job)
        self.gpu.advance()
        yield self._drain()

    def join(self) -> Waits:
        """Waits for the GPU and the CPU."""
        if self._unfinished:
            yield self._drain()

    def execute(self, plan: LayerPlan, record: LayerRecord) -> Waits:
        """Submits a layer's operations; in synchronous mode, waits for each before the next."""
        self._record = record
        self._log.submitted(record.step, plan.operations)
        if self._synchronous:
            yield from self._one_by_one(plan.operations, record)
            return
        if self.link.prefetch:
            self.link.promote(
                {copy for operation in plan.operations if operation.op == GPU for copy in operation.after}
            )
        first = True
        for operation in plan.operations:
            self._enqueue(operation, record, first)
            first = first and operation.op != CPU
        self._advance()
        self._pull()

    def busy_changed(self) -> None:
        """A resource began or ended a job: every busy one goes on at its new rate."""
        busy = frozenset([resource.name for resource in self._resources if resource.job is not None])
        for resource in self._resources:
            if resource.job is not None:
                resource.rerate(self._rates[resource.name, busy])

    def ended(self, resource: Resource, job: Job) -> None:
        """A resource has finished a job: keep the books, and start whatever waited for it."""
        if self.contended:
            self.busy_changed()
        self._note(resource, job)
        for operation in job.operations:
            self.pending.discard(operation.id)
            self.awaited.discard(operation.id)
        if resource is self.link:
            self._copied(job)
        else:
            job.record.end_s = self.now_s
            self._unfinished -= len(job.parts_s)
            if self.link.job is None:
                self.link.advance()
        resource.advance()
        if self.gpu.job is None:
            self.gpu.advance()
        if not self._unfinished and self._drained is not None:
            self._drained.succeed()
            self._drained = None

    def _drain(self) -> Any:
        """An event for the end of all submitted work; while the host waits, arrivals bring further prefetches."""
        self._pull()
        self._drained = self.env.event()
        return self._drained

    def _one_by_one(self, operations: list[Operation], record: LayerRecord) -> Waits:
        first = True
        for operation in operations:
            self._enqueue(operation, record, first)
            first = first and operation.op != CPU
            self._unfinished += operation.op == COPY
            self._advance()
            if operation.op != EVICT:
                yield self._drain()

    def _advance(self) -> None:
        self.link.advance()
        self.cpu.advance()
        self.gpu.advance()

    def _enqueue(self, operation: Operation, record: LayerRecord, first: bool) -> None:
        """Queues an operation on its resource; ``first`` says whether a CPU expert is its layer's first."""
        op, costs = operation.op, self._costs
        if op == EVICT:
            return
        self.pending.add(operation.id)
        if op == GPU:
            self._unfinished += 1
            self.gpu.queue.append(Job("expert", record, (costs.gpu_expert_s(operation.tokens),), (operation,)))
        elif op == CPU:
            self._unfinished += 1
            self.cpu.queue.append(Job("expert", record, (costs.cpu_expert_s(operation.tokens, first),), (operation,)))
        else:
            self.awaited.update(operation.after)
            kind, queue = ("prefetch", self.link.prefetch) if operation.prefetch else ("copy", self.link.demand)
            queue.append(Job(kind, record, (costs.copy_s(operation.bytes),), (operation,)))

    def _poll(self) -> None:
        """Reports arrivals, in the order in which they came."""
        for operation in self._arrived:
            self._controller.on_arrival(operation)
        self._arrived.clear()

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        if self._synchronous:
            return
        self._poll()
        while self.link.outstanding < LINK_WINDOW and (operations := self._controller.next_transfer()):
            self._log.submitted(self._record.step, operations)
            for operation in operations:
                self._enqueue(operation, LayerRecord(self._record.step, operation.layer), False)
            self.link.advance()

    def _copied(self, job: Job) -> None:
        if self._synchronous:
            self._unfinished -= 1
        if job.kind == "prefetch":
            self._arrived.append(job.operations[0])
        if self._drained is not None:
            self._pull()

    def _note(self, resource: Resource, job: Job) -> None:
        """Adds a finished job to its layer's busy time and to the event rows."""
        start_s, record, end_s = resource.start_s, job.record, self.now_s
        busy_s = end_s - start_s
        if resource is self.link:
            record.transfer_s += busy_s if job.kind == "copy" else 0.0
        elif resource is self.cpu:
            record.cpu_s += busy_s
        elif job.operations:
            record.gpu_s += busy_s
        else:
            record.dense_s += busy_s
        if self._log.events is not None:
            self._note_events(resource, job, busy_s)

    def _note_events(self, resource: Resource, job: Job, busy_s: float) -> None:
        """One event row for each part of a job, in proportion to the work of the parts."""
        start_s = resource.start_s
        if not job.operations:
            self._log.event(resource.name, job.kind, job.record, -1, start_s, self.now_s)
        stretch = busy_s / job.duration_s if job.duration_s else 1.0
        for operation, part_s in zip(job.operations, job.parts_s, strict=False):
            end_s = start_s + part_s * stretch
            self._log.event(resource.name, job.kind, job.record, operation.expert, start_s, end_s)
            start_s = end_s


def is_contended(costs: Costs) -> bool:
    """Whether any resource slows another down."""
    return any(rate != 1.0 for rate in _rates(costs).values())


def _rates(costs: Costs) -> dict[tuple[str, frozenset[str]], float]:
    """Seconds of work a second, by resource and by the set of busy resources (itself included)."""
    names = (Gpu.name, Link.name, Cpu.name)
    sets = [frozenset(chosen) for count in (1, 2, 3) for chosen in combinations(names, count)]
    return {(name, busy): 1.0 / costs.slowdown(name, busy - {name}) for busy in sets for name in busy}
