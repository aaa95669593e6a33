"""GPU, CPU, link and disk by arithmetic: the times of a layer's work follow when it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sim.logs import LayerRecord
from sim.plan import COPY, CPU, EVICT, GPU, READ, LayerPlan, Operation
from traces.workload import Routing

if TYPE_CHECKING:
    from sim.engine import Engine

EVENT_NAMES = {
    COPY: ("link", "copy"),
    GPU: ("gpu", "expert"),
    CPU: ("cpu", "expert"),
    READ: ("disk", "read"),
    EVICT: ("link-back", "write-back"),
}
"""Resource and kind in the events table, by the kind of operation."""

NOTHING: tuple[()] = ()
"""What the host has to wait for: no event, since ``now_s`` has moved on already."""


class Answers(dict[int, float]):
    """What a cost function says, asked once for each number of tokens or bytes."""

    def __init__(self, ask: Callable[[int], float]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, amount: int) -> float:
        self[amount] = seconds = self._ask(amount)
        return seconds


class Timeline:
    """Says when every operation begins and ends, without an event for any of them.

    A recurrence: an operation begins when its resource is free and the operations in its ``after`` have ended; each
    resource serves in order of submission. In synchronous mode an operation begins when the one before has ended. It
    holds as long as nothing enters a queue between two submissions, and no resource slows another down.
    """

    def __init__(self, engine: Engine) -> None:
        self.now_s = 0.0
        self._controller, self._costs, self._log = engine.controller, engine.costs, engine.log
        self._synchronous = engine.controller.system.synchronous
        self._computed_s = self._copied_s = 0.0
        self._cpu_free_s = 0.0  # when the CPU has ended what was submitted, deferred experts included
        self._deferred_s = 0.0  # when those have ended that the next layer waits for
        self._aside_s = {READ: 0.0, EVICT: 0.0}  # when the disk, and the way back to the host, are free
        self._ends: dict[int, float] = {}
        costs = engine.costs
        self._gpu_expert_s, self._copy_s = Answers(costs.gpu_expert_s), Answers(costs.copy_s)
        self._aside = {READ: Answers(costs.read_s), EVICT: Answers(costs.write_back_s)}

    def sleep(self, seconds: float) -> tuple[()]:
        """The host works for ``seconds``."""
        self.now_s += seconds
        return NOTHING

    def read_back(self, seconds: float, layer: int, routing: Routing) -> tuple[()]:
        """The host reads what ``layer``'s router chose; nothing has arrived that was not waited for."""
        self.now_s += seconds
        return NOTHING

    def dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> tuple[()]:
        """Dispatches a dense part, runs it on the GPU after all that was submitted, and waits for its end."""
        start_s = self.now_s + dispatch_s
        if start_s < self._computed_s:
            start_s = self._computed_s
        self.now_s = self._computed_s = record.end_s = start_s + duration_s
        record.dense_s = duration_s
        if self._log.events is not None:
            self._log.event("gpu", kind, record, -1, start_s, self.now_s)
        return NOTHING

    def cpu_dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> tuple[()]:
        """The same on the CPU."""
        start_s = max(self.now_s + dispatch_s, self._computed_s)
        self.now_s = self._computed_s = record.end_s = start_s + duration_s
        record.dense_s = duration_s
        self._log.event("cpu", kind, record, -1, start_s, self.now_s)
        return NOTHING

    def cross(self, record: LayerRecord, seconds: float, *, back: bool) -> tuple[()]:
        """Moves the hidden state to the device, or ``back`` to the host, when all that was submitted has ended."""
        start_s = max(self.now_s, self._computed_s, self._aside_s[EVICT] if back else self._copied_s)
        self.now_s = start_s + seconds
        if back:
            self._aside_s[EVICT] = self.now_s
        else:
            self._copied_s = self.now_s
        record.transfer_s += seconds
        self._log.event("link-back" if back else "link", "hidden", record, -1, start_s, self.now_s)
        return NOTHING

    def join(self) -> tuple[()]:
        """Waits for the GPU and the CPU."""
        self.now_s = max(self.now_s, self._computed_s)
        return NOTHING

    def execute(self, plan: LayerPlan, record: LayerRecord) -> tuple[()]:
        """Submits a layer's operations; in synchronous mode, waits for each before the next."""
        self._log.submitted(record.step, plan.operations)
        if self._synchronous:
            self._one_by_one(plan.operations, record)
        else:
            self._overlapped(plan.operations, record)
        return NOTHING

    def finish(self) -> None:
        """Nothing to do: every time is known when its work is submitted."""

    def _overlapped(self, operations: list[Operation], record: LayerRecord) -> None:
        """Submits without waiting. The GPU is free, for the dense part has waited for it, and so is the CPU but for
        experts that were deferred."""
        gpu_s = now_s = self.now_s
        cpu_s, owed_s, deferred_s = max(now_s, self._cpu_free_s), self._deferred_s, 0.0
        link_s = max(now_s, self._copied_s)
        gpu_busy_s = link_busy_s = 0.0
        gpu_expert_s, copy_s, keep_events = self._gpu_expert_s, self._copy_s, self._log.events is not None
        first = True
        ends = self._still_open(now_s) if self._ends else {}
        for number, op, layer, expert, _, tokens, size_bytes, after, _, deferred in operations:
            if op == GPU:
                for copy in after:
                    if gpu_s < ends[copy]:
                        gpu_s = ends[copy]
                seconds, start_s = gpu_expert_s[tokens], gpu_s
                gpu_busy_s += seconds
                ends[number] = gpu_s = start_s + seconds
            elif op == COPY:
                for earlier in after:
                    if link_s < ends.get(earlier, 0.0):  # what is not there ended in an earlier layer
                        link_s = ends[earlier]
                seconds, start_s = copy_s[size_bytes], link_s
                link_busy_s += seconds
                ends[number] = link_s = start_s + seconds
            elif op == CPU:
                for earlier in after:
                    cpu_s = max(cpu_s, ends.get(earlier, 0.0))
                handed = first and record.layer not in self._controller.layers_on_cpu
                seconds, start_s, first = self._costs.cpu_expert_s(tokens, handed), cpu_s, False
                record.cpu_s += seconds
                ends[number] = cpu_s = start_s + seconds
                if deferred:
                    deferred_s = self._ends[number] = cpu_s
                else:
                    owed_s = cpu_s
            elif size_bytes:
                moved = LayerRecord(record.step, layer) if op == EVICT else record
                self._beside(op, number, expert, size_bytes, after, moved, ends)
                continue
            else:
                continue
            if keep_events:
                self._log.event(*EVENT_NAMES[op], record, expert, start_s, ends[number])
        record.gpu_s = gpu_busy_s
        record.transfer_s += link_busy_s
        self._copied_s = link_s
        self._cpu_free_s, self._deferred_s = cpu_s, deferred_s
        self._computed_s = record.end_s = max(gpu_s, owed_s)

    def _beside(
        self,
        op: str,
        number: int,
        expert: int,
        size_bytes: int,
        after: tuple[int, ...],
        record: LayerRecord,
        ends: dict[int, float],
    ) -> None:
        """A read from the disk or a write-back, which nobody waits for but what names it; one may outlast its layer.

        ``record`` is of the expert's own layer: who leaves a shared pool may be another's.
        """
        start_s = max(self.now_s, self._aside_s[op], *[ends.get(earlier, 0.0) for earlier in after])
        end_s = self._aside_s[op] = ends[number] = self._ends[number] = start_s + self._aside[op][size_bytes]
        self._log.event(*EVENT_NAMES[op], record, expert, start_s, end_s)

    def _still_open(self, now_s: float) -> dict[int, float]:
        """When those operations end that have outlasted their layer."""
        self._ends = {number: end_s for number, end_s in self._ends.items() if end_s > now_s}
        return {**self._ends}

    def _one_by_one(self, operations: list[Operation], record: LayerRecord) -> None:
        """Waits for each operation before the next."""
        first = record.layer not in self._controller.layers_on_cpu
        for _, op, layer, expert, _, tokens, size_bytes, *_ in operations:
            told = record
            if op == GPU:
                seconds = self._gpu_expert_s[tokens]
                record.gpu_s += seconds
            elif op == COPY:
                seconds = self._copy_s[size_bytes]
                record.transfer_s += seconds
            elif op == CPU:
                seconds, first = self._costs.cpu_expert_s(tokens, first), False
                record.cpu_s += seconds
            elif size_bytes:
                seconds, told = self._aside[op][size_bytes], LayerRecord(record.step, layer)
            else:
                continue
            start_s = self.now_s
            self.now_s = start_s + seconds
            self._log.event(*EVENT_NAMES[op], told, expert, start_s, self.now_s)
        self._copied_s = self._computed_s = self._cpu_free_s = record.end_s = self.now_s
