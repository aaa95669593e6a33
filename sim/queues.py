"""GPU, CPU, link and disk as SimPy resources: an event for every transfer and every group of kernels."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from sim.controller import OffloadController
from sim.costs import Costs
from sim.logs import LayerRecord
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.resources import Gpu, Job, Link, Resource
from traces.workload import Routing

if TYPE_CHECKING:
    from sim.engine import Engine

LINK_WINDOW = 2
"""Copies that may be outstanding before no further prefetch is asked for."""

ALWAYS = ("gpu", "link", "cpu")
"""Resources that every run has."""

Waits = Generator[Any, Any, None]
"""What a process yields: SimPy events to wait for."""


class Queues:
    """Queues work on the resources, and lets the host wait for it; ``env`` is the SimPy environment."""

    def __init__(self, engine: Engine, env: Any) -> None:
        controller, costs = engine.controller, engine.costs
        self.env, self.pending, self.awaited = env, set[int](), set[int]()
        self.gpu, self.cpu = Gpu(self, "gpu"), Resource(self, "cpu")
        self.link = Link(self, costs.copy_s(costs.chunk_bytes) if costs.chunk_bytes else 0.0)
        self.back, self.disk = Resource(self, "link-back"), Resource(self, "disk")
        self._controller, self._costs, self._log = controller, costs, engine.log
        used = resources_of(controller)
        self._resources = [one for one in (self.back, self.disk, self.link, self.cpu, self.gpu) if one.name in used]
        alone = len(used) == len(ALWAYS)
        self._woken = {self.gpu: [self.link, self.gpu], self.cpu: [self.cpu, self.gpu]} if alone else {}
        self._rates = _rates(costs, used)
        self.contended = is_contended(costs, used)
        self._synchronous = controller.system.synchronous
        self._looks_ahead = controller.system.prefetch != "none" and not self._synchronous
        self._unfinished = 0
        self._waiting = False
        self._drained: Any = None
        self._arrived: list[Operation] = []
        self._deferred: list[Job] = []  # CPU experts that the layer after their own waits for
        self._record = LayerRecord(0, 0)

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return float(self.env.now)

    def sleep(self, seconds: float) -> Waits:
        """The host works for ``seconds``."""
        if seconds:
            yield self.env.timeout(seconds)

    def read_back(self, seconds: float, layer: int, routing: Routing) -> Waits:
        """The host reads what ``layer``'s router chose; the controller learns what has arrived by then, and prefetches
        that have not begun and are stale are taken back."""
        yield from self.sleep(seconds)
        self._poll()
        self._withdraw(layer, routing)

    def dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> Waits:
        """Dispatches a dense part, runs it on the GPU after all that was submitted, and waits for its end."""
        yield from self.sleep(dispatch_s)
        job = Job(kind, record, (duration_s,), counted=1)
        ahead = [job for job in (*self.cpu.queue, self.cpu.job) if job is not None and job.counted]
        job.after = tuple(one.operations[0].id for one in ahead)
        self._unfinished += 1
        self.gpu.queue.append(job)
        self.gpu.advance()
        yield self._drain()

    def cpu_dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> Waits:
        """The same on the CPU."""
        yield from self.sleep(dispatch_s)
        yield from self.join()
        yield from self._alone(self.cpu, Job(kind, record, (duration_s,), counted=1))

    def cross(self, record: LayerRecord, seconds: float, *, back: bool) -> Waits:
        """Moves the hidden state to the device, or ``back`` to the host, when all that was submitted has ended."""
        yield from self.join()
        yield from self._alone(self.back if back else self.link, Job("hidden", record, (seconds,), counted=1))

    def join(self) -> Waits:
        """Waits for the GPU and the CPU."""
        if self._unfinished:
            yield self._drain()

    def execute(self, plan: LayerPlan, record: LayerRecord) -> Waits:
        """Submits a layer's operations; in synchronous mode, waits for each before the next."""
        self._record = record
        self._collect(record)
        self._log.submitted(record.step, plan.operations)
        first = record.layer not in self._controller.layers_on_cpu
        if self._synchronous:
            yield from self._one_by_one(plan.operations, record, first)
            return
        if self.link.outstanding or self.disk.second:
            self._promote(plan.operations)
        for operation in plan.operations:
            self._enqueue(operation, record, first)
            first = first and operation.op != CPU
        self._advance()
        self._pull()

    def _collect(self, record: LayerRecord) -> None:
        """From now on the host waits for what the layer before deferred, as a part of this one."""
        for job in self._deferred:
            if job.operations[0].id in self.pending:
                job.counted, job.ends_with = 1, record
                self._unfinished += 1
        self._deferred.clear()

    def finish(self) -> None:
        """Nothing to do: SimPy runs until the last event."""

    def busy_changed(self) -> None:
        """A resource began or ended a job: every busy one goes on at its new rate."""
        busy = frozenset([resource.name for resource in self._resources if resource.job is not None])
        for resource in self._resources:
            if resource.job is not None:
                resource.rerate(self._rates[resource.name, busy])

    def ended(self, resource: Resource, job: Job) -> None:
        """A resource has finished a job, or a part of one: keep the books, and start whatever waited for it."""
        if self.contended:
            self.busy_changed()
        self._note(resource, job)
        if job.rest_s:
            rest = Job(job.kind, job.record, (job.rest_s,), job.operations)
            rest.begun = True
            self.link.second.appendleft(rest)
        else:
            for operation in job.operations:
                self.pending.discard(operation.id)
                self.awaited.discard(operation.id)
            self._unfinished -= job.counted
            if resource is self.link:
                self._copied(job)
        self._advance(self._woken.get(resource))
        if not self._unfinished and self._drained is not None:
            self._drained.succeed()
            self._drained = None

    def _copied(self, job: Job) -> None:
        if job.kind == "prefetch":
            self._arrived.append(job.operations[0])
        if self._waiting:
            self._pull()

    def _drain(self) -> Any:
        """An event for the end of all submitted work; while the host waits, arrivals bring further prefetches."""
        self._waiting = True
        self._pull()
        self._drained = self.env.event()
        self._drained.callbacks.append(self._resume)
        return self._drained

    def _resume(self, event: Any) -> None:
        """The host waits no longer."""
        self._waiting = False

    def _alone(self, resource: Resource, job: Job) -> Waits:
        """Runs ``job`` where nothing but transfers is under way, and waits for it."""
        resource.queue.append(job)
        self._unfinished += job.counted
        resource.advance()
        yield self._drain()

    def _one_by_one(self, operations: list[Operation], record: LayerRecord, first: bool) -> Waits:
        for operation in operations:
            self._enqueue(operation, record, first)
            first = first and operation.op != CPU
            self._advance()
            if self._unfinished:
                yield self._drain()

    def _advance(self, woken: list[Resource] | None = None) -> None:
        """Starts what may begin on ``woken``, those that may have waited for what ended, or on all resources."""
        for resource in woken or self._resources:
            if (resource.queue or resource.second) and (resource.job is None or resource.yields):
                resource.advance()

    def _promote(self, operations: Iterable[Operation]) -> None:
        """What these operations wait for need not stand back any longer, nor what that waits for itself."""
        waited = {number for operation in operations for number in operation.after}
        for job in self.link.second:
            if job.operations[0].id in waited:
                waited |= {*job.after}
        self.link.promote(waited)
        self.disk.promote(waited)

    def _enqueue(self, operation: Operation, record: LayerRecord, first: bool) -> None:
        """Queues an operation on its resource; ``first`` says whether a CPU expert would be its layer's first."""
        op, costs = operation.op, self._costs
        if op == GPU:
            job = Job("expert", record, (costs.gpu_expert_s(operation.tokens),), (operation,), 1)
            self.gpu.queue.append(job)
        elif op == CPU:
            counted = int(self._synchronous or not operation.deferred)
            job = Job("expert", record, (costs.cpu_expert_s(operation.tokens, first),), (operation,), counted)
            self.cpu.queue.append(job)
            if not counted:
                self._deferred.append(job)
        elif operation.bytes:
            job = self._transfer(operation, record)
        else:
            return
        self.pending.add(operation.id)
        self._unfinished += job.counted

    def _transfer(self, operation: Operation, record: LayerRecord) -> Job:
        """Queues what moves bytes."""
        op, costs, waited = operation.op, self._costs, int(self._synchronous)
        self.awaited.update(operation.after)
        if op == EVICT:
            record = LayerRecord(record.step, operation.layer)  # of the expert that leaves, maybe another layer's
            job = Job("write-back", record, (costs.write_back_s(operation.bytes),), (operation,), waited)
            self.back.queue.append(job)
            return job
        if op == COPY:
            seconds, kind = costs.copy_s(operation.bytes), "copy"
        else:
            seconds, kind = costs.read_s(operation.bytes), "read"
        resource = self.link if op == COPY else self.disk
        if operation.prefetch:
            job = Job("prefetch" if op == COPY else kind, record, (seconds,), (operation,))
            resource.second.append(job)
        else:
            job = Job(kind, record, (seconds,), (operation,), waited)
            resource.queue.append(job)
        return job

    def _poll(self) -> None:
        """Reports arrivals, in the order in which they came."""
        for operation in self._arrived:
            self._controller.on_arrival(operation)
        self._arrived.clear()

    def _withdraw(self, layer: int, routing: Routing) -> None:
        for job in [*reversed(self.link.second)]:  # slots go back as they were given
            (operation,) = job.operations
            if job.begun or not self._controller.is_stale(operation, layer, routing):
                continue
            self.link.second.remove(job)
            self.pending.discard(operation.id)
            self._log.withdrawn(operation)
            self._controller.on_withdrawal(operation)

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        if not self._looks_ahead:
            return
        self._poll()
        while self.link.outstanding < LINK_WINDOW and (operations := self._controller.next_transfer()):
            self._log.submitted(self._record.step, operations)
            for operation in operations:
                self._enqueue(operation, LayerRecord(self._record.step, operation.layer), False)
            self._advance()

    def _note(self, resource: Resource, job: Job) -> None:
        """Adds a finished job to its layer's busy time and to the event rows."""
        record, end_s = job.record, self.env.now
        busy_s = end_s - resource.start_s
        if resource is self.gpu or resource is self.cpu:
            if job.counted:
                job.ends_with.end_s = end_s
            if not job.operations:
                record.dense_s += busy_s
            elif resource is self.gpu:
                record.gpu_s += busy_s
            else:
                record.cpu_s += busy_s
        elif job.kind in ("copy", "hidden"):
            record.transfer_s += busy_s
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


def resources_of(controller: OffloadController) -> tuple[str, ...]:
    """Names of the resources that a run may use."""
    goes_back = controller.system.write_back or controller.system.dense_follows
    more = [("link-back", goes_back), ("disk", controller.reads_disk)]
    return (*ALWAYS, *[name for name, used in more if used])


def is_contended(costs: Costs, names: tuple[str, ...] = ALWAYS) -> bool:
    """Whether any of the resources slows another down."""
    return any(rate != 1.0 for rate in _rates(costs, names).values())


def _rates(costs: Costs, names: tuple[str, ...]) -> dict[tuple[str, frozenset[str]], float]:
    """Seconds of work a second, by resource and by the set of busy resources (itself included)."""
    chosen = chain.from_iterable(combinations(names, count) for count in range(1, len(names) + 1))
    return {(name, busy): 1.0 / costs.slowdown(name, busy - {name}) for busy in map(frozenset, chosen) for name in busy}
