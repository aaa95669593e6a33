"""The arithmetic of :mod:`sim.timeline` where prefetches fill the link: times follow copy by copy."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from sim.logs import LayerRecord
from sim.plan import COPY, CPU, GPU, LayerPlan, Operation
from sim.queues import LINK_WINDOW
from sim.timeline import EVENT_NAMES, NOTHING, Timeline
from traces.workload import Routing

if TYPE_CHECKING:
    from sim.engine import Engine

REMEMBERED = 256
"""Ends of operations that are kept before those that are past are forgotten."""

Submitted = tuple[Operation, LayerRecord, float]
"""A copy, the layer that it is noted with, and when it was submitted."""


class AheadTimeline(Timeline):
    """Says when every operation begins and ends, also where copies are made ahead.

    Kernels and CPU experts follow from the copies, as in a :class:`~sim.timeline.Timeline`. What the link takes next is
    settled whenever it is free: the demand that was submitted first, else the prefetch, if what it waits for has ended.
    While the host waits, every copy that ends lets the controller ask for more. At one instant, what ends comes first,
    then what begins, and then the host.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._demand, self._prefetch = deque[Submitted](), deque[Submitted]()
        self._kernels = deque[tuple[Operation, LayerRecord]]()  # GPU experts behind one whose copy has not begun
        self._untimed: set[int] = set()  # operations whose end is not known yet
        self._under_way: deque[tuple[float, Operation]] = deque()  # prefetches that are not reported yet
        self._gpu_s = self._cpu_s = 0.0
        self._step = 0

    def read_back(self, seconds: float, layer: int, routing: Routing) -> tuple[()]:
        """The host reads what ``layer``'s router chose; the controller learns what has arrived by then, and prefetches
        that have not begun and are stale are taken back."""
        self.now_s += seconds
        self._serve(self.now_s)
        self._poll()
        for submitted in [*reversed(self._prefetch)]:
            operation = submitted[0]
            if self._controller.is_stale(operation, layer, routing):
                self._prefetch.remove(submitted)
                self._untimed.discard(operation.id)
                self._log.withdrawn(operation)
                self._controller.on_withdrawal(operation)
        return NOTHING

    def dense(self, kind: str, record: LayerRecord, dispatch_s: float, duration_s: float) -> tuple[()]:
        """Dispatches a dense part, runs it on the GPU after all that was submitted, and waits for its end."""
        self.now_s += dispatch_s
        start_s = self._wait(duration_s)
        self._gpu_s = record.end_s = self.now_s
        record.dense_s = duration_s
        if self._log.events is not None:
            self._log.event("gpu", kind, record, -1, start_s, self.now_s)
        return NOTHING

    def join(self) -> tuple[()]:
        """Waits for the GPU and the CPU."""
        self._serve(self.now_s)
        if self._kernels or self._gpu_s > self.now_s or self._cpu_s > self.now_s:
            self._wait(0.0)
        return NOTHING

    def execute(self, plan: LayerPlan, record: LayerRecord) -> tuple[()]:
        """Submits a layer's operations without waiting. The GPU is free, for the dense part has waited for it, and so
        is the CPU but for experts that were deferred."""
        now_s, self._step = self.now_s, record.step
        self._log.submitted(record.step, plan.operations)
        self._serve(now_s)
        if len(self._ends) > REMEMBERED:
            self._ends = self._still_open(now_s)
        self._gpu_s = now_s
        self._cpu_s = record.end_s = max(now_s, self._deferred_s)
        if self._prefetch:
            self._promote(plan.operations)
        self._submit(plan.operations, record)
        self._pull()
        return NOTHING

    def finish(self) -> None:
        """Lets the link end what is still queued, though nobody waits for it."""
        self._serve(inf)

    def _promote(self, operations: list[Operation]) -> None:
        """What these operations wait for need not stand back any longer."""
        waited = {number for operation in operations for number in operation.after}
        for submitted in [one for one in self._prefetch if one[0].id in waited]:
            self._prefetch.remove(submitted)
            self._demand.append(submitted)

    def _submit(self, operations: list[Operation], record: LayerRecord) -> None:
        """Queues a layer's copies and kernels, and times what waits for nothing that is queued."""
        now_s, untimed = self.now_s, self._untimed
        free_s, deferred_s = max(now_s, self._cpu_free_s), 0.0
        first = record.layer not in self._controller.layers_on_cpu
        for operation in operations:
            number, op, _, expert, _, tokens, size_bytes, _, _, deferred = operation
            if op == GPU:
                self._kernels.append((operation, record))
                untimed.add(number)
                if len(self._kernels) == 1:
                    self._time_kernels()
            elif op == COPY:
                self._demand.append((operation, record, now_s))
                untimed.add(number)
            elif op == CPU:
                seconds, first = self._costs.cpu_expert_s(tokens, first), False
                start_s, free_s = free_s, free_s + seconds
                record.cpu_s += seconds
                if deferred:
                    deferred_s = free_s
                else:
                    self._cpu_s, record.end_s = free_s, max(record.end_s, free_s)
                self._log.event("cpu", "expert", record, expert, start_s, free_s)
            elif size_bytes:
                self._save(operation)
        self._cpu_free_s, self._deferred_s = free_s, deferred_s

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        now_s = self.now_s
        self._serve(now_s)
        self._poll()
        while len(self._demand) + len(self._prefetch) + (self._copied_s > now_s) < LINK_WINDOW:
            operations = self._controller.next_transfer()
            if not operations:
                return
            self._log.submitted(self._step, operations)
            for operation in operations:
                if operation.op == COPY:
                    self._prefetch.append((operation, LayerRecord(self._step, operation.layer), now_s))
                    self._untimed.add(operation.id)
                elif operation.bytes:
                    self._save(operation)
            self._serve(now_s)

    def _save(self, operation: Operation) -> None:
        """Times a write-back, which the way back to the host takes in order of submission."""
        number, op, layer, expert, _, _, size_bytes, after, *_ = operation
        self._beside(op, number, expert, size_bytes, after, LayerRecord(self._step, layer), self._ends)

    def _poll(self) -> None:
        """Reports arrivals, in the order in which they came."""
        while self._under_way and self._under_way[0][0] <= self.now_s:
            self._controller.on_arrival(self._under_way.popleft()[1])

    def _wait(self, duration_s: float) -> float:
        """The host waits until all that was submitted has ended, and then for another ``duration_s``; returns when
        these began."""
        begun_s = self.now_s
        self._pull()
        while True:
            start_s = inf if self._kernels else max(begun_s, self._gpu_s, self._cpu_s)
            copying = self._copied_s > self.now_s
            next_s = self._copied_s if copying else min(map(self._ready_s, (self._demand, self._prefetch)))
            if next_s > start_s + duration_s or next_s == inf:
                self.now_s = start_s + duration_s
                return start_s
            self.now_s = next_s
            if copying:
                self._pull()
            else:
                self._serve(next_s)

    def _serve(self, until_s: float) -> None:
        """Begins the copies that begin by ``until_s``."""
        demand, prefetch = self._demand, self._prefetch
        while self._copied_s <= until_s and (demand or prefetch):
            queue, start_s = demand, self._ready_s(demand)
            if prefetch and (prefetch_s := self._ready_s(prefetch)) < start_s:
                queue, start_s = prefetch, prefetch_s
            if start_s > until_s or start_s == inf:
                return
            self._begin(*queue.popleft()[:2], start_s)

    def _ready_s(self, queue: deque[Submitted]) -> float:
        """When the first copy of a queue may begin: the link is free, and what it waits for has ended."""
        if not queue:
            return inf
        operation, _, submitted_s = queue[0]
        ready_s = max(self._copied_s, submitted_s)
        for earlier in operation.after:
            if earlier in self._untimed:
                return inf
            ready_s = max(ready_s, self._ends.get(earlier, 0.0))
        return ready_s

    def _begin(self, operation: Operation, record: LayerRecord, start_s: float) -> None:
        """The link begins a copy: its end is known, and so are those of kernels that have waited for it."""
        seconds, number = self._copy_s[operation.bytes], operation.id
        self._copied_s = self._ends[number] = end_s = start_s + seconds
        self._untimed.discard(number)
        if operation.prefetch:
            self._under_way.append((end_s, operation))
        else:
            record.transfer_s += seconds
        if self._log.events is not None:
            kind = "prefetch" if operation.prefetch else "copy"
            self._log.event("link", kind, record, operation.expert, start_s, end_s)
        if self._kernels:
            self._time_kernels()

    def _time_kernels(self) -> None:
        """Times the GPU's experts in their order, up to the first whose copy has not begun."""
        kernels, untimed, ends = self._kernels, self._untimed, self._ends
        while kernels:
            operation, record = kernels[0]
            start_s = self._gpu_s
            for copy in operation.after:
                if copy in untimed:
                    return
                start_s = max(start_s, ends.get(copy, 0.0))
            kernels.popleft()
            seconds = self._gpu_expert_s[operation.tokens]
            self._gpu_s = ends[operation.id] = end_s = start_s + seconds
            untimed.discard(operation.id)
            record.gpu_s += seconds
            record.end_s = max(record.end_s, end_s)
            if self._log.events is not None:
                self._log.event(*EVENT_NAMES[GPU], record, operation.expert, start_s, end_s)
