"""The simulated clock: a host process, in SimPy, that runs a controller's plans on GPU, CPU, link and disk.

Rules. The GPU runs its work in order of submission. The link serves one copy at a time; demand copies go before
prefetches, and a copy that has begun is not interrupted, or only where a chunk of it ends. The way back to the host is
independent of it. A computation waits for its own copy only, a copy for the last read of its slot, for what saves the
slot's old expert and for what brings the new one from the disk, the next layer's dense part for the CPU's experts.
While several resources are busy each one advances at the rate that the costs say. At one instant, what ends comes
first, then what begins, and then the host. ``docs/engine.md`` lists the mechanisms, and how each is switched off.

Two machines keep these rules. :class:`~sim.queues.Queues` has an event for every transfer and kernel.
:class:`~sim.timeline.Timeline` works the same times out when a layer is submitted, and its child for prefetches copy by
copy, which is possible as long as nothing slows anything else down; the engine takes them whenever it can.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import simpy

from sim.ahead import AheadTimeline
from sim.controller import OffloadController
from sim.costs import Costs
from sim.logs import LayerRecord, RunLog
from sim.queues import LINK_WINDOW, Queues, is_contended, resources_of
from sim.timeline import Timeline
from traces.batching import InOrder, Scheduler
from traces.workload import Routing, Step

__all__ = ["LINK_WINDOW", "Engine", "Predictions", "has_closed_form"]

BEFORE = -1
"""The step of operations that come before the first one: what is loaded then takes no time of the run."""

Process = Generator[Any, Any, None]
Predictions = Sequence[Sequence[Sequence[tuple[int, int]]]]
"""By layer, by distance: (expert, tokens)."""


class Engine:
    """Runs forward passes in simulated time. One engine serves one run; its log is ``log``."""

    def __init__(
        self,
        controller: OffloadController,
        costs: Costs,
        *,
        events: bool = True,
        operations: bool = True,
        closed_form: bool | None = None,
    ) -> None:
        """``events`` and ``operations`` say which of the long tables are kept. ``closed_form`` picks the machine; None
        takes the quicker one that applies. Raises ValueError when the closed form does not."""
        self.env = simpy.Environment()
        self.controller, self.costs = controller, costs
        self.log = RunLog(events=events, operations=operations)
        if controller.reads_disk:
            costs.read_s(controller.shape.expert_bytes)  # refused here where the machine has no disk
        if controller.system.dense_follows:
            costs.cpu_dense_s(1, 1)
        applies = has_closed_form(controller, costs)
        if closed_form and not applies:
            raise ValueError("closed form must apply to be used, got a run whose resources meet in ways it cannot tell")
        self._closed = applies if closed_form is None else closed_form
        self._machine: Timeline | Queues = self._made()
        self._host = costs.host
        depth, layers = controller.system.lookahead_depth, controller.shape.layers
        self._lookahead_s = [costs.lookahead_s(min(depth, layers - 1 - layer)) for layer in range(layers)]

    def _made(self) -> Timeline | Queues:
        system = self.controller.system
        if not self._closed:
            return Queues(self, self.env)
        return Timeline(self) if system.synchronous or system.prefetch == "none" else AheadTimeline(self)

    def run(
        self,
        steps: Iterable[Step] | Scheduler,
        routing: Callable[[Step], list[Routing]],
        predictions: Callable[[Step], Predictions],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs ``steps``, or what a scheduler says, and is idle until the time for which it waits.

        The callables give a step's routing and predictions by layer. ``progress`` follows each step.
        """
        scheduler = steps if isinstance(steps, Scheduler) else InOrder(steps)
        self.log.arrival_s = scheduler.arrival_s
        self.log.submitted(BEFORE, self.controller.preload())

        def host() -> Process:
            while (turn := scheduler.next(self._machine.now_s)) is not None:
                if isinstance(turn, Step):
                    yield from self._step(turn, routing(turn), predictions(turn))
                else:
                    yield from self._machine.sleep(turn - self._machine.now_s)
                if self._closed:
                    yield self.env.timeout(max(0.0, self._machine.now_s - self.env.now))
                if isinstance(turn, Step):
                    progress()

        self.env.process(host())
        self.env.run()
        self._machine.finish()

    def _step(self, step: Step, routings: list[Routing], predictions: Predictions) -> Process:
        machine, start_s, dispatch_s = self._machine, self._machine.now_s, self._host.layer_s
        self.controller.begin_step(step.index, new_batch=step.new_batch)
        tokens, lanes, on_cpu = len(step.rows), len(step.sequences), self.controller.layers_on_cpu
        dense_s = self.costs.dense_s(tokens, step.context, lanes)
        records: list[LayerRecord] = []
        for layer, routing in enumerate(routings):
            record = LayerRecord(step.index, layer)
            if on_cpu:
                yield from self._placed("dense", record, step, dense_s + self._lookahead_s[layer])
            else:
                yield from machine.dense("dense", record, dispatch_s, dense_s + self._lookahead_s[layer])
            before_s = records[-1].end_s if records else start_s
            waited_s = record.dense_s + record.transfer_s
            record.host_s = max(0.0, machine.now_s - waited_s - before_s)  # dispatch that nothing covered
            records.append(record)
            yield from self._experts(record, routing, predictions[layer] if predictions else ())
        head = LayerRecord(step.index, len(routings))
        yield from self._placed("head", head, step, self.costs.head_s(lanes, step.context, tokens))
        self.log.step(step, start_s, machine.now_s, machine.now_s - records[-1].end_s, records)

    def _placed(self, kind: str, record: LayerRecord, step: Step, gpu_s: float) -> Process:
        """A dense part on the device where its layer runs; the hidden state comes there from the layer before."""
        machine, costs, dispatch_s = self._machine, self.costs, self._host.layer_s
        on_cpu, was_on_cpu = (record.layer - back in self.controller.layers_on_cpu for back in (0, 1))
        if record.layer and on_cpu != was_on_cpu:
            yield from machine.sleep(dispatch_s)
            dispatch_s, size_bytes = 0.0, costs.hidden_bytes(len(step.rows))
            seconds = costs.write_back_s(size_bytes) if on_cpu else costs.copy_s(size_bytes)
            yield from machine.cross(record, seconds, back=on_cpu)
        if not on_cpu:
            yield from machine.dense(kind, record, dispatch_s, gpu_s)
            return
        cpu_s = costs.cpu_dense_s(len(step.rows), step.context, len(step.sequences))
        yield from machine.cpu_dense(kind, record, dispatch_s, cpu_s)

    def _experts(
        self, record: LayerRecord, routing: Routing, predictions: Sequence[Sequence[tuple[int, int]]]
    ) -> Process:
        """The router's choice, the controller's decisions, and their submission."""
        machine, host = self._machine, self._host
        start_s = machine.now_s
        on_cpu = record.layer in self.controller.layers_on_cpu  # where the host reads the choice at once
        yield from machine.read_back(0.0 if on_cpu else host.readback_s, record.layer, routing)
        plan = record.plan = self.controller.plan_layer(record.layer, routing, predictions)
        record.python_s = host.controller_s + self.costs.deciding_s(plan.union)
        record.python_s += host.operation_s * len(plan.operations)
        if plan.cpu_experts and not on_cpu:
            record.python_s += host.cpu_s
        yield from machine.sleep(record.python_s)
        record.end_s = machine.now_s
        record.host_s += record.end_s - start_s
        if self.log.events is not None:
            self.log.event("host", "plan", record, -1, start_s, record.end_s)
        yield from machine.execute(plan, record)
        if host.joins_layers:
            yield from self._join(record)

    def _join(self, record: LayerRecord) -> Process:
        """The host itself waits for the layer, as it must where compute is not asynchronous."""
        join_s = self._host.join_s
        if record.plan is not None and record.plan.cpu_experts:
            join_s += self._host.cpu_join_s
        yield from self._machine.join()
        yield from self._machine.sleep(join_s)
        record.host_s += join_s
        record.end_s = self._machine.now_s


def has_closed_form(controller: OffloadController, costs: Costs) -> bool:
    """Whether times follow by arithmetic: in synchronous mode, and where no resource slows another down. With prefetch
    copies must be whole, the host's memory must hold all experts, and all dense work must be on the GPU."""
    system = controller.system
    if system.synchronous:
        return True
    plain = not (controller.reads_disk or system.dense_follows or costs.chunk_bytes)
    return (system.prefetch == "none" or plain) and not is_contended(costs, resources_of(controller))
