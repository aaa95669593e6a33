"""The simulated clock: a host process, in SimPy, that runs a controller's plans on GPU, CPU and link.

Rules. The GPU runs its work in order of submission. The link serves one copy at a time; demand copies go before
prefetches, and a copy that has begun is not interrupted. A computation waits for its own copy only, a copy for the
last read of its slot, the next layer's dense part for the CPU's experts. While several resources are busy each one
advances at the rate that the costs say. Simultaneous events are ordered by SimPy's (time, priority, sequence).

Two machines keep these rules. :class:`~sim.queues.Queues` has an event for every transfer and kernel.
:class:`~sim.timeline.Timeline` works the same times out when a layer is submitted, which is possible as long as no
prefetch can slip in between and nothing slows anything else down; the engine takes it whenever it can.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from sim.controller import OffloadController
from sim.costs import Costs
from sim.logs import LayerRecord, RunLog
from sim.queues import LINK_WINDOW, Queues, is_contended
from sim.timeline import Timeline
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
        applies = has_closed_form(controller, costs)
        if closed_form and not applies:
            raise ValueError("closed form must have neither prefetch nor contention, got a run with one of them")
        self._closed = applies if closed_form is None else closed_form
        self._machine: Timeline | Queues
        self._machine = Timeline(self) if self._closed else Queues(self, self.env)
        self._host = costs.host
        self._lookahead_s = costs.lookahead_s(controller.system.lookahead_depth)

    def run(
        self,
        steps: Sequence[Step],
        routing: Callable[[Step], list[Routing]],
        predictions: Callable[[Step], Predictions],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs ``steps``; the callables give a step's routing and predictions by layer. ``progress`` follows each."""

        self.log.submitted(BEFORE, self.controller.preload())

        def host() -> Process:
            for step in steps:
                yield from self._step(step, routing(step), predictions(step))
                if self._closed:
                    yield self.env.timeout(max(0.0, self._machine.now_s - self.env.now))
                progress()

        self.env.process(host())
        self.env.run()

    def _step(self, step: Step, routings: list[Routing], predictions: Predictions) -> Process:
        machine, start_s = self._machine, self._machine.now_s
        self.controller.begin_step(step.index, new_batch=step.starts == step.sequences)
        dense_s = self.costs.dense_s(len(step.rows), step.context) + self._lookahead_s
        records: list[LayerRecord] = []
        for layer, routing in enumerate(routings):
            record = LayerRecord(step.index, layer)
            yield from machine.dense("dense", record, self._host.layer_s, dense_s)
            before_s = records[-1].end_s if records else start_s
            record.host_s = max(0.0, machine.now_s - record.dense_s - before_s)  # dispatch that nothing covered
            records.append(record)
            yield from self._experts(record, routing, predictions[layer] if predictions else ())
        head = LayerRecord(step.index, len(routings))
        head_s = self.costs.head_s(len(step.sequences), step.context)
        yield from machine.dense("head", head, self._host.layer_s, head_s)
        self.log.step(step, start_s, machine.now_s, machine.now_s - records[-1].end_s, records)

    def _experts(
        self, record: LayerRecord, routing: Routing, predictions: Sequence[Sequence[tuple[int, int]]]
    ) -> Process:
        """The router's choice, the controller's decisions, and their submission."""
        machine, host = self._machine, self._host
        start_s = machine.now_s
        yield from machine.read_back(host.readback_s)
        plan = record.plan = self.controller.plan_layer(record.layer, routing, predictions)
        yield from machine.sleep(host.controller_s + host.operation_s * len(plan.operations))
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
        yield from self._machine.join()
        yield from self._machine.sleep(join_s)
        record.host_s += join_s
        record.end_s = self._machine.now_s


def has_closed_form(controller: OffloadController, costs: Costs) -> bool:
    """Whether all times of a layer follow when it is submitted: in synchronous mode, and without prefetch where no
    resource slows another down."""
    system = controller.system
    return system.synchronous or (system.prefetch == "none" and not is_contended(costs))
