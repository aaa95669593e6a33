"""What a clock writes down while it runs, and the rows of the result tables that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.plan import LayerPlan, Operation
from sim.results import RunInfo, RunResult
from traces.schema import Phase
from traces.workload import Step


class LayerRecord:
    """One layer of one step: its plan, and the seconds that its resources were busy for it."""

    __slots__ = ("cpu_s", "dense_s", "end_s", "gpu_s", "host_s", "layer", "plan", "python_s", "step", "transfer_s")

    def __init__(self, step: int, layer: int) -> None:
        self.step, self.layer = step, layer
        self.dense_s = self.gpu_s = self.cpu_s = self.transfer_s = self.host_s = self.python_s = self.end_s = 0.0
        self.plan: LayerPlan | None = None


class RunLog:
    """The log of one run, on either clock. Event and operation rows can be left out, for sweeps."""

    def __init__(self, *, events: bool = True, operations: bool = True) -> None:
        self.events: list[tuple[Any, ...]] | None = [] if events else None
        self.arrival_s: Mapping[int, float] = {}
        """By sequence; one that is not there arrives when its first step begins, as in an offline run."""
        self._submitted: list[tuple[int, Sequence[Operation]]] | None = [] if operations else None
        self._steps: list[tuple[Step, float, float, float]] = []
        self._layers: list[tuple[Any, ...]] = []

    def operation(self, step: int, operation: Operation) -> None:
        """Notes that ``operation`` is being submitted."""
        self.submitted(step, (operation,))

    def submitted(self, step: int, operations: Sequence[Operation]) -> None:
        """Notes that ``operations`` are being submitted, in this order."""
        if self._submitted is not None:
            self._submitted.append((step, operations))

    def withdrawn(self, operation: Operation) -> None:
        """Forgets ``operation``, which was submitted not long ago and has been taken back."""
        for place in reversed(range(len(self._submitted or ()))):
            assert self._submitted is not None, "it is not empty"
            step, operations = self._submitted[place]
            if any(one.id == operation.id for one in operations):
                self._submitted[place] = (step, [one for one in operations if one.id != operation.id])
                return

    def event(self, resource: str, kind: str, record: LayerRecord, expert: int, start_s: float, end_s: float) -> None:
        """Notes a piece of work on a resource; ``expert`` is -1 for what is no expert's."""
        if self.events is not None:
            self.events.append((resource, kind, record.step, record.layer, expert, start_s, end_s))

    def step(self, step: Step, start_s: float, end_s: float, head_s: float, records: list[LayerRecord]) -> None:
        """Notes that a forward pass has ended; ``records`` has one entry a layer, in order."""
        self._steps.append((step, start_s, end_s, head_s))
        phase = int(step.phase)
        for record in records:
            self._layers.append(_layer_row(record, phase, start_s))
            start_s = record.end_s

    def result(self, info: RunInfo) -> RunResult:
        """The tables of the run."""
        return RunResult.of(
            info,
            requests=self._requests(),
            tokens=self._tokens(),
            layers=self._layers,
            events=sorted(self.events or [], key=lambda row: (row[5], row[6], row[0])),
            operations=self._operations(),
        )

    def _tokens(self) -> list[tuple[Any, ...]]:
        return [
            (step.index, int(step.phase), sequence, count, start_s, end_s, head_s)
            for step, start_s, end_s, head_s in self._steps
            for sequence, count in zip(step.sequences, step.tokens, strict=True)
        ]

    def _operations(self) -> list[tuple[Any, ...]]:
        submitted = ((step, operation) for step, operations in self._submitted or [] for operation in operations)
        return [
            (number, step, layer, op, expert, slot, tokens, size)
            for number, (step, (_, op, layer, expert, slot, tokens, size, *_)) in enumerate(submitted)
        ]

    def _requests(self) -> list[tuple[Any, ...]]:
        """One row a sequence. Its first token comes with the last pass of its prompt, or else with its first pass."""
        rows: dict[int, list[Any]] = {}
        for step, start_s, end_s, _ in self._steps:
            for sequence, count in zip(step.sequences, step.tokens, strict=True):
                if sequence not in rows:
                    rows[sequence] = [sequence, self.arrival_s.get(sequence, start_s), start_s, end_s, end_s, 0, 0]
                row = rows[sequence]
                row[4] = end_s
                if step.phase == Phase.PREFILL:
                    row[3] = end_s
                row[5 + int(step.phase)] += count
        return [tuple(row) for row in rows.values()]


def _layer_row(record: LayerRecord, phase: int, start_s: float) -> tuple[Any, ...]:
    plan = record.plan
    assert plan is not None, "a layer that ended has a plan"
    end_s, dense_s, gpu_s, host_s = record.end_s, record.dense_s, record.gpu_s, record.host_s
    stall_s = end_s - start_s - dense_s - gpu_s - host_s
    return (
        record.step,
        record.layer,
        phase,
        *plan[2:],  # the cache's answer, which is in the order of the table
        start_s,
        end_s,
        dense_s,
        gpu_s,
        record.cpu_s,
        record.transfer_s,
        host_s,
        stall_s if stall_s > 0.0 else 0.0,
        record.python_s,
    )
