"""From what a device says of its work to a layer's seconds and event rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from real.device import Work
from sim.logs import LayerRecord, RunLog
from sim.plan import COPY, GPU, Operation


class TimedLayer(NamedTuple):
    """A layer whose times are read at the end of its step: marks of its dense part's begin, its router, its end."""

    record: LayerRecord
    works: list[tuple[Operation, Work]]
    dense: Any
    begun: Any
    ended: Any

    def resolve(self, log: RunLog, time_of: Callable[[Any], float]) -> LayerRecord:
        """Turns marks and works into the record's seconds, and writes their event rows down."""
        record = self.record
        dense_s, begun_s, record.end_s = time_of(self.dense), time_of(self.begun), time_of(self.ended)
        record.dense_s = begun_s - dense_s
        first_s, last_s = record.end_s, begun_s
        log.event("gpu", "dense", record, -1, dense_s, begun_s)
        for operation, resource, start_s, end_s in spans(self.works):
            busy_s = end_s - start_s
            log.event(resource, "copy" if operation.op == COPY else "expert", record, operation.expert, start_s, end_s)
            first_s = min(first_s, start_s)
            if operation.op == COPY:
                record.transfer_s += busy_s
                continue
            last_s = max(last_s, end_s)
            if operation.op == GPU:
                record.gpu_s += busy_s
            else:
                record.cpu_s += busy_s
        record.host_s = max(0.0, first_s - begun_s) + max(0.0, record.end_s - max(last_s, first_s))
        log.event("host", "plan", record, -1, begun_s, first_s)
        return record


def spans(works: Sequence[tuple[Operation, Work]]) -> Iterator[tuple[Operation, str, float, float]]:
    """Each operation of a layer, what did it, and from when to when.

    Operations that are one work get equal shares of its time, one after the other in their order. That approximates
    what cannot be seen: within a group no expert has a time of its own, and small ones run side by side. The sum is
    right, and a share is what an expert costs where others are computed with it, which is what calibration learns
    from whole runs and the simulator charges for each, one after the other.
    """
    sizes, places = Counter([id(work) for _, work in works]), Counter[int]()
    for operation, work in works:
        size, place, whole_s = sizes[id(work)], places[id(work)], work.end_s - work.start_s
        places[id(work)] = place + 1
        end_s = work.end_s if place + 1 == size else work.start_s + whole_s * (place + 1) / size
        yield operation, work.resource, work.start_s + whole_s * place / size, end_s
