"""GPU, link and CPU by arithmetic: the times of a layer's work follow when it is submitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.logs import LayerRecord
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation

if TYPE_CHECKING:
    from sim.engine import Engine

EVENT_NAMES = {COPY: ("link", "copy"), GPU: ("gpu", "expert"), CPU: ("cpu", "expert")}
"""Resource and kind in the events table, by the kind of operation."""

NOTHING: tuple[()] = ()
"""What the host has to wait for: no event, since ``now_s`` has moved on already."""


class Timeline:
    """Says when every operation begins and ends, without an event for any of them.

    A recurrence: an operation begins when its resource is free and the operations in its ``after`` have ended; each
    resource serves in order of submission. In synchronous mode a resource is free when all of them are. It holds as
    long as nothing enters a queue between two submissions, and no resource slows another down.
    """

    def __init__(self, engine: Engine) -> None:
        self.now_s = 0.0
        self._costs, self._log = engine.costs, engine.log
        self._synchronous = engine.controller.system.synchronous
        self._computed_s = self._copied_s = 0.0

    def sleep(self, seconds: float) -> tuple[()]:
        """The host works for ``seconds``."""
        self.now_s += seconds
        return NOTHING

    def poll(self) -> None:
        """Nothing arrives that was not asked for."""

    def dense(self, kind: str, record: LayerRecord, duration_s: float) -> tuple[()]:
        """Runs a dense part after all that was submitted, and waits for its end."""
        start_s = max(self.now_s, self._computed_s)
        self.now_s = self._computed_s = record.end_s = start_s + duration_s
        record.dense_s += duration_s
        self._log.event("gpu", kind, record, -1, start_s, self.now_s)
        return NOTHING

    def join(self) -> tuple[()]:
        """Waits for the GPU and the CPU."""
        self.now_s = max(self.now_s, self._computed_s)
        return NOTHING

    def execute(self, plan: LayerPlan, record: LayerRecord) -> tuple[()]:
        """Submits a layer's operations; in synchronous mode, waits for each before the next."""
        self._log.submitted(record.step, plan.operations)
        now_s, keep_events = self.now_s, self._log.events is not None
        free = {GPU: now_s, CPU: now_s, COPY: max(now_s, self._copied_s)}  # the dense part has waited for both
        busy = {GPU: 0.0, CPU: 0.0, COPY: 0.0}
        ends: dict[int, float] = {}
        for operation in plan.operations:
            number, op, _, expert, _, _, _, after, _ = operation
            if op == EVICT:
                continue
            start_s, seconds = free[op], self._seconds(operation, busy)
            for earlier in after:
                start_s = max(start_s, ends[earlier])
            ends[number] = free[op] = end_s = start_s + seconds
            busy[op] += seconds
            if self._synchronous:
                free = dict.fromkeys(free, end_s)
            if keep_events:
                self._log.event(*EVENT_NAMES[op], record, expert, start_s, end_s)
        self._close(record, free, busy)
        return NOTHING

    def _seconds(self, operation: Operation, busy: dict[str, float]) -> float:
        """How long an operation takes; a CPU expert is its layer's first while the CPU has not been busy."""
        _, op, _, _, _, tokens, size_bytes, _, _ = operation
        if op == GPU:
            return self._costs.gpu_expert_s(tokens)
        if op == COPY:
            return self._costs.copy_s(size_bytes)
        return self._costs.cpu_expert_s(tokens, not busy[CPU])

    def _close(self, record: LayerRecord, free: dict[str, float], busy: dict[str, float]) -> None:
        """Enters a layer's busy times, and when its resources are free again."""
        self._computed_s, self._copied_s = max(free[GPU], free[CPU]), free[COPY]
        record.gpu_s, record.cpu_s, record.transfer_s = busy[GPU], busy[CPU], busy[COPY]
        record.end_s = self._computed_s
        if self._synchronous:
            self.now_s = self._computed_s
