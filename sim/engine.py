"""The simulated clock: executes a controller's plans on GPU, CPU, link and host as SimPy resources.

Rules. The GPU runs its work in order of submission. The link serves one copy at a time; demand copies go before
prefetches, and a copy that has begun is not interrupted. A computation waits for its own copy only, a copy for the
last read of its slot, the next layer's dense part for the CPU's experts. While several resources are busy each one
advances at the rate that the costs say. Simultaneous events are ordered by SimPy's (time, priority, sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import combinations
from typing import Any

import simpy

from sim.controller import OffloadController
from sim.costs import Costs
from sim.logs import LayerRecord, RunLog
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.resources import Cpu, Gpu, Job, Link, Resource
from traces.workload import Routing, Step

LINK_WINDOW = 2
"""Copies that may be outstanding before no further prefetch is asked for."""

Process = Generator[simpy.Event, Any, None]
Predictions = Sequence[Sequence[Sequence[int]]]


class Engine:
    """Runs forward passes in simulated time. One engine serves one run; its log is ``log``."""

    def __init__(self, controller: OffloadController, costs: Costs, *, events: bool = True) -> None:
        self.env = simpy.Environment()
        self.controller, self.costs, self.log = controller, costs, RunLog(events=events)
        self.gpu, self.link, self.cpu = Gpu(self), Link(self), Cpu(self)
        self.pending: set[int] = set()
        self.awaited: set[int] = set()
        self._resources = (self.gpu, self.link, self.cpu)
        self._rates = _rates(costs)
        self.contended = any(rate != 1.0 for rate in self._rates.values())
        self._unfinished = 0
        self._drained: simpy.Event | None = None
        self._arrived: list[Operation] = []
        self._record = LayerRecord(0, 0)
        self._synchronous = controller.system.synchronous
        self._lookahead_s = costs.lookahead_s(controller.system.lookahead_depth)

    def run(
        self,
        steps: Sequence[Step],
        routing: Callable[[Step], list[Routing]],
        predictions: Callable[[Step], Predictions],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs ``steps``; the callables give a step's routing and predictions by layer. Calls ``progress`` each step."""

        def host() -> Process:
            for step in steps:
                yield from self._step(step, routing(step), predictions(step))
                progress()

        self.env.process(host())
        self.env.run()

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
            job.record.end_s = self.env.now
            self._unfinished -= len(job.parts_s)
            if self.link.job is None:
                self.link.advance()
        resource.advance()
        if self.gpu.job is None:
            self.gpu.advance()
        if not self._unfinished and self._drained is not None:
            self._drained.succeed()
            self._drained = None

    def _step(self, step: Step, routings: list[Routing], predictions: Predictions) -> Process:
        start_s, tokens = self.env.now, len(step.rows)
        self.controller.begin_step(step.index)
        dense_s = self.costs.dense_s(tokens, step.context) + self._lookahead_s
        records = []
        for layer, routing in enumerate(routings):
            record = LayerRecord(step.index, layer)
            records.append(record)
            yield from self._layer(record, dense_s, routing, predictions[layer] if predictions else ())
        head = LayerRecord(step.index, len(routings))
        yield from self._on_gpu("head", head, self.costs.head_s(len(step.sequences), step.context))
        self.log.step(step, start_s, self.env.now, self.env.now - records[-1].end_s, records)

    def _layer(
        self, record: LayerRecord, dense_s: float, routing: Routing, predictions: Sequence[Sequence[int]]
    ) -> Process:
        """Dense part, the router's choice, the controller's decisions, and their submission."""
        env, host, controller = self.env, self.costs.host, self.controller
        yield from self._on_gpu("dense", record, dense_s)
        start_s = env.now
        if host.readback_s:
            yield env.timeout(host.readback_s)
        self._poll()
        plan = record.plan = controller.plan_layer(record.layer, routing, predictions)
        yield env.timeout(host.controller_s + host.operation_s * len(plan.operations))
        self._record = record
        record.host_s = env.now - start_s
        self.log.event("host", "plan", record, -1, start_s, env.now)
        if self._synchronous:
            yield from self._one_by_one(plan, record)
        else:
            self._submit(plan, record)
            self._pull()
        if host.joins_layers:
            yield from self._join(record)

    def _on_gpu(self, kind: str, record: LayerRecord, duration_s: float) -> Process:
        """Dispatches a dense part and waits for its end."""
        host = self.costs.host
        if host.layer_s:
            yield self.env.timeout(host.layer_s)
        self._unfinished += 1
        job = Job(kind, record, (duration_s,))
        job.after = tuple(job.operations[0].id for job in (*self.cpu.queue, self.cpu.job) if job is not None)
        self.gpu.queue.append(job)
        self.gpu.advance()
        yield self._drain()

    def _join(self, record: LayerRecord) -> Process:
        """The host itself waits for the layer, as it must where compute is not asynchronous."""
        if self._unfinished:
            yield self._drain()
        if self.costs.host.join_s:
            yield self.env.timeout(self.costs.host.join_s)
            record.host_s += self.costs.host.join_s
        record.end_s = self.env.now

    def _drain(self) -> simpy.Event:
        """An event for the end of all submitted work; while the host waits, arrivals bring further prefetches."""
        self._pull()
        self._drained = self.env.event()
        return self._drained

    def _one_by_one(self, plan: LayerPlan, record: LayerRecord) -> Process:
        for operation in plan.operations:
            self._submit(plan._replace(operations=[operation]), record)
            if operation.op == COPY:
                self._unfinished += 1
            if operation.op != EVICT:
                yield self._drain()

    def _submit(self, plan: LayerPlan, record: LayerRecord) -> None:
        """Hands a layer's operations to their resources, without waiting."""
        if self.link.prefetch:
            self.link.promote({copy for operation in plan.operations if operation.op == GPU for copy in operation.after})
        first = True
        for operation in plan.operations:
            self._enqueue(operation, record, first)
            first = first and operation.op != CPU
        self.link.advance()
        self.cpu.advance()
        self.gpu.advance()

    def _enqueue(self, operation: Operation, record: LayerRecord, first: bool = True) -> None:
        """Logs an operation and queues it; ``first`` says whether a CPU expert is its layer's first."""
        self.log.operation(record.step, operation)
        op, costs = operation.op, self.costs
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
            self.controller.on_arrival(operation)
        self._arrived.clear()

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        if self._synchronous:
            return
        self._poll()
        while self.link.outstanding < LINK_WINDOW and (operations := self.controller.next_transfer()):
            for operation in operations:
                self._enqueue(operation, self._record)
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
        start_s, record = resource.start_s, job.record
        busy_s = self.env.now - start_s
        if resource is self.link:
            record.transfer_s += busy_s if job.kind == "copy" else 0.0
        elif resource is self.cpu:
            record.cpu_s += busy_s
        elif job.operations:
            record.gpu_s += busy_s
        else:
            record.dense_s += busy_s
        if self.log.events is None:
            return
        if not job.operations:
            self.log.event(resource.name, job.kind, record, -1, start_s, self.env.now)
        stretch = busy_s / job.duration_s if job.duration_s else 1.0
        for operation, part_s in zip(job.operations, job.parts_s, strict=False):
            end_s = start_s + part_s * stretch
            self.log.event(resource.name, job.kind, record, operation.expert, start_s, end_s)
            start_s = end_s


def _rates(costs: Costs) -> dict[tuple[str, frozenset[str]], float]:
    """Seconds of work a second, by resource and by the set of busy resources (itself included)."""
    names = (Gpu.name, Link.name, Cpu.name)
    sets = [frozenset(chosen) for count in (1, 2, 3) for chosen in combinations(names, count)]
    return {(name, busy): 1.0 / costs.slowdown(name, busy - {name}) for busy in sets for name in busy}
