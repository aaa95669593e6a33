"""GPU, link and CPU by arithmetic: the times of a layer's work follow when it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sim.logs import LayerRecord
from sim.plan import COPY, CPU, GPU, LayerPlan, Operation

if TYPE_CHECKING:
    from sim.engine import Engine

EVENT_NAMES = {COPY: ("link", "copy"), GPU: ("gpu", "expert"), CPU: ("cpu", "expert")}
"""Resource and kind in the events table, by the kind of operation."""

NOTHING: tuple[()] = ()
"""What the host has to wait for: no event, since ``now_s`` has moved on already."""


class _Answers(dict[int, float]):
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
        self._costs, self._log = engine.costs, engine.log
        self._synchronous = engine.controller.system.synchronous
        self._computed_s = self._copied_s = 0.0
        self._gpu_expert_s, self._copy_s = _Answers(engine.costs.gpu_expert_s), _Answers(engine.costs.copy_s)

    def sleep(self, seconds: float) -> tuple[()]:
        """The host works for ``seconds``."""
        self.now_s += seconds
        return NOTHING

    def read_back(self, seconds: float) -> tuple[()]:
        """The host reads the router's choice; nothing has arrived that was not waited for."""
        self.now_s += seconds
        return NOTHING

    def dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> tuple[()]:
        """Dispatches a dense part, runs it after all that was submitted, and waits for its end."""
        start_s = self.now_s + dispatch_s
        if start_s < self._computed_s:
            start_s = self._computed_s
        self.now_s = self._computed_s = record.end_s = start_s + duration_s
        record.dense_s = duration_s
        if self._log.events is not None:
            self._log.event("gpu", kind, record, -1, start_s, self.now_s)
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

    def _overlapped(self, operations: list[Operation], record: LayerRecord) -> None:
        """Submits without waiting. GPU and CPU are free, for the dense part has waited for both."""
        gpu_s = cpu_s = now_s = self.now_s
        link_s = max(now_s, self._copied_s)
        gpu_busy_s = link_busy_s = 0.0
        gpu_expert_s, copy_s, keep_events = self._gpu_expert_s, self._copy_s, self._log.events is not None
        ends: dict[int, float] = {}
        for number, op, _, expert, _, tokens, size_bytes, after, _ in operations:
            if op == GPU:
                for copy in after:
                    if gpu_s < ends[copy]:
                        gpu_s = ends[copy]
                seconds, start_s = gpu_expert_s[tokens], gpu_s
                gpu_busy_s += seconds
                ends[number] = gpu_s = start_s + seconds
            elif op == COPY:
                for read in after:
                    if link_s < ends[read]:
                        link_s = ends[read]
                seconds, start_s = copy_s[size_bytes], link_s
                link_busy_s += seconds
                ends[number] = link_s = start_s + seconds
            elif op == CPU:
                seconds, start_s = self._costs.cpu_expert_s(tokens, cpu_s == now_s), cpu_s  # the first begins now
                record.cpu_s += seconds
                ends[number] = cpu_s = start_s + seconds
            else:
                continue
            if keep_events:
                self._log.event(*EVENT_NAMES[op], record, expert, start_s, ends[number])
        record.gpu_s, record.transfer_s = gpu_busy_s, link_busy_s
        self._copied_s = link_s
        self._computed_s = record.end_s = max(gpu_s, cpu_s)

    def _one_by_one(self, operations: list[Operation], record: LayerRecord) -> None:
        """Waits for each operation before the next."""
        first = True
        for _, op, _, expert, _, tokens, size_bytes, _, _ in operations:
            if op == GPU:
                seconds = self._gpu_expert_s[tokens]
                record.gpu_s += seconds
            elif op == COPY:
                seconds = self._copy_s[size_bytes]
                record.transfer_s += seconds
            elif op == CPU:
                seconds, first = self._costs.cpu_expert_s(tokens, first), False
                record.cpu_s += seconds
            else:
                continue
            start_s = self.now_s
            self.now_s = start_s + seconds
            self._log.event(*EVENT_NAMES[op], record, expert, start_s, self.now_s)
        self._copied_s = self._computed_s = record.end_s = self.now_s
