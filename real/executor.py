"""Runs a controller's plans with torch, in the place of a model's experts, and writes down what really happened.

Shapes: T rows of a forward pass (padding included), k experts a token, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from real.device import Device, Work
from real.generate import NO_TOKEN
from real.kernels import Kernel, gated, kernel_for
from real.models.load import LoadedModel
from real.routing import RouteListener, RouterCall, RouterTap, lookahead, router_scores
from real.store import DeviceSlots, HostStore
from sim.controller import OffloadController
from sim.engine import BEFORE
from sim.logs import LayerRecord, RunLog
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.queues import LINK_WINDOW
from sim.run import most_named
from traces.schema import Phase
from traces.workload import Step

IMPLEMENTATION = "moetwin_offload"
"""Name under which the executor stands in the experts interface of transformers."""

Predictions = Sequence[Sequence[tuple[int, int]]]


class Executor:
    """Stands in for the experts of a model for the time of a ``with`` block. One executor serves one run.

    Give it to ``generate`` as hooks. With ``forecast`` the predictions for the layers after a given one come from
    there, and with ``scores`` a layer's router scores (routing replay); the later layers' routers are run, and the
    model's own scores are read, all the same, because that is a part of the cost. With
    ``steps`` the forward passes are those of a known workload, and are written down under its sequence numbers.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        controller: OffloadController,
        device: Device,
        store: HostStore,
        *,
        slots: DeviceSlots | None = None,
        listeners: Sequence[RouteListener] = (),
        forecast: Callable[[int], Predictions] | None = None,
        scores: Callable[[int], Any] | None = None,
        steps: Sequence[Step] | None = None,
    ) -> None:
        self.log = RunLog()
        self.slots = slots or DeviceSlots(store, controller.cache.total_slots, device.torch_device)
        self._loaded, self._controller, self._device, self._store = loaded, controller, device, store
        self._forecast, self._scores_at, self._known = forecast, scores, steps
        self._scored = "scores" in controller.system.needs
        self._scores: Any = None
        self._act = loaded.family.act_fn(loaded.config)
        self._routers = [layer.router for layer in loaded.layers]
        self._listeners = listeners
        self._synchronous = controller.system.synchronous
        self._depth = controller.system.lookahead_depth
        self._prefetching = controller.system.prefetch != "none" and not self._synchronous
        self._predictions: Predictions = ()
        self._book = _StepBook()
        self._real: Tensor | None = None
        self._works: dict[int, Work] = {}
        self._loads: dict[int, Work] = {}  # by slot: what has filled it last
        self._prefetches: list[_Prefetch] = []
        self._saves: list[tuple[Operation, Work, LayerRecord]] = []
        self._layers: list[_Layer] = []
        self._record = LayerRecord(0, 0)
        self._step_mark: Any = None
        self._dense_mark: Any = None

    def __enter__(self) -> Executor:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
        self._implementation = self._loaded.config._experts_implementation
        for layer in self._loaded.layers:
            layer.experts.moetwin = (self, layer.index)  # type: ignore[assignment]
        self._loaded.model.set_experts_implementation(IMPLEMENTATION)
        self._tap = RouterTap(self._loaded.layers, *self._listeners, self).__enter__()
        self._preload()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish(failed=error is not None)
        finally:
            self._tap.__exit__(kind, error, trace)
            del self._tap  # it knows the executor: without the circle the slots are freed with it
            self._loaded.model.set_experts_implementation(self._implementation)
            for layer in self._loaded.layers:
                del layer.experts.moetwin

    def _preload(self) -> None:
        """Loads what the system wants to be there before the first step."""
        works = []
        for operation in self._controller.preload():
            work = self._load(operation)
            works.append(work)
            self.log.operation(BEFORE, _as_taken(operation, work))
        self._device.wait(works)

    def begin_step(self, step_index: int, phase: Phase, mask: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """A forward pass begins; shapes as in :class:`real.generate.StepHooks`."""
        step = self._book.begin(phase, mask, positions)
        step = step if self._known is None else self._known[step.index]
        self._real = None if bool(mask.all()) else mask.flatten()
        self._controller.begin_step(step.index, new_batch=step.starts == step.sequences)
        self._step_mark = self._dense_mark = self._device.mark()

    def end_step(self, next_tokens: list[int]) -> None:
        """A forward pass has ended: its times are read and written down."""
        mark = self._device.mark()
        self._device.settle()
        start_s, end_s = self._device.time_of(self._step_mark), self._device.time_of(mark)
        records = [self._resolve(layer) for layer in self._layers]
        self._layers.clear()
        self._poll()
        self._note_saves()
        head = LayerRecord(self._book.index, len(records))
        self._event_at("gpu", "head", head, records[-1].end_s, end_s)
        step = self._book.end(next_tokens)
        step = step if self._known is None else self._known[step.index]
        self.log.step(step, start_s, end_s, end_s - records[-1].end_s, records)

    def on_route(self, call: RouterCall) -> None:
        """Reads a router's scores and looks ahead from its input when the system needs it; never changes the choice."""
        if self._scored:
            scores = router_scores(call.logits)
            real = scores if self._real is None else scores[self._real.cpu().numpy()]
            self._scores = real.astype("float64") if self._scores_at is None else self._scores_at(call.layer)
        if not self._depth:
            return
        ids = lookahead(call.hidden, call.layer, self._depth, self._routers, call.ids.shape[-1])
        if self._forecast is not None:
            self._predictions = self._forecast(call.layer)
            return
        rows = ids if self._real is None else ids[self._real]
        self._predictions = [most_named(rows[:, ahead].flatten().tolist()) for ahead in range(self._depth)]

    def experts(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The output [T, H] of one layer's experts for ``hidden`` [T, H], ``ids`` and ``weights`` [T, k]."""
        begun = self._device.mark()
        kernel = kernel_for(self.compute, hidden, ids, weights, self._real)
        self._poll()
        routing = kernel.routing._replace(scores=self._scores) if self._scored else kernel.routing
        plan = self._controller.plan_layer(layer, routing, self._predictions)
        record = self._record = LayerRecord(self._book.index, layer)
        record.plan = plan
        works = self._submit(plan, kernel, record)
        computed = [work for operation, work in works if operation.op != COPY]
        self._device.wait(computed, self._pull if self._prefetching else None)
        result = kernel.result()
        ended = self._device.mark()
        self._layers.append(_Layer(record, works, self._dense_mark, begun, ended))
        self._works = {number: work for number, work in self._works.items() if not work.done}
        self._dense_mark = ended
        return result

    def compute(self, operation: Operation, hidden: Tensor) -> Tensor:
        """One expert on rows [n, H]: on the device from its slot, or on the CPU from the host store."""
        if operation.op == GPU:
            gate_up, down = self.slots.read(operation.slot, operation.layer, operation.expert)
        else:
            gate_up, down = self._store.views(self._store.expert(operation.layer, operation.expert))
        return gated(self._act, gate_up, down, hidden)

    def _finish(self, *, failed: bool) -> None:
        """Leaves the device with nothing to do: prefetches nobody waited for still end, unless the run has failed."""
        try:
            if not failed:
                self._device.wait([one.work for one in self._prefetches] + [work for _, work, _ in self._saves])
        finally:
            self._device.drain()
        if not failed:
            self._poll()
            self._note_saves()

    def _submit(self, plan: LayerPlan, kernel: Kernel, record: LayerRecord) -> list[tuple[Operation, Work]]:
        """Hands a plan to the device: without waiting, or one operation after the other in synchronous mode."""
        self._promote(plan)
        works = []
        for operation in plan.operations:
            if operation.op == EVICT and not operation.bytes:
                self.log.operation(record.step, operation)
                continue
            work = self._works[operation.id] = self._start(operation, kernel)
            self.log.operation(record.step, _as_taken(operation, work))
            if operation.op != EVICT:
                works.append((operation, work))
            if self._synchronous:
                self._device.wait([work])
        self._pull()
        return works

    def _start(self, operation: Operation, kernel: Kernel) -> Work:
        if operation.op == GPU:
            return self._device.gpu(partial(kernel.run, operation), self._awaited(operation))
        if operation.op == CPU:
            return self._device.cpu(kernel.on_cpu(operation))
        return self._save(operation) if operation.op == EVICT else self._load(operation)

    def _load(self, operation: Operation) -> Work:
        """Starts a copy to the device."""
        load = partial(self.slots.load, operation.slot, operation.layer, operation.expert)
        work = self._device.copy(load, self._awaited(operation), prefetch=operation.prefetch)
        self._loads[operation.slot] = work
        return work

    def _save(self, operation: Operation) -> Work:
        """Starts a copy back to the host, which must not read a slot before it has been filled."""
        slot, layer, expert = operation.slot, operation.layer, operation.expert
        work = self._device.save(partial(self.slots.save, slot, layer, expert), [self._loads[slot]])
        self._saves.append((operation, work, LayerRecord(self._record.step, layer)))
        return work

    def _awaited(self, operation: Operation) -> list[Work]:
        return [self._works[earlier] for earlier in operation.after if earlier in self._works]

    def _promote(self, plan: LayerPlan) -> None:
        """Prefetches that this layer turns out to wait for need not stand back any longer."""
        if not self._prefetches:
            return
        waited = {number for operation in plan.operations if operation.op == GPU for number in operation.after}
        self._device.promote([one.work for one in self._prefetches if one.operation.id in waited])

    def _poll(self) -> None:
        """Reports prefetches that have arrived, in the order of their submission."""
        for one in self._prefetches:
            if one.work.error is not None:
                raise one.work.error
            if one.work.done and not one.reported:
                one.reported = True
                self._controller.on_arrival(one.operation)
        for one in [one for one in self._prefetches if one.reported and one.work.finished]:
            self._prefetches.remove(one)
            self._event("prefetch", one.record, one.operation.expert, one.work)

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        if self._prefetching:
            self._poll()
            while self._outstanding() < LINK_WINDOW and (operations := self._controller.next_transfer()):
                for operation in operations:
                    self.log.operation(self._record.step, self._ahead(operation))
        self._device.flush()

    def _ahead(self, operation: Operation) -> Operation:
        """Starts a prefetch, or the eviction that makes room for it, and returns it as the device took it."""
        if operation.op == EVICT and not operation.bytes:
            return operation
        work = self._works[operation.id] = self._save(operation) if operation.op == EVICT else self._load(operation)
        if operation.op == COPY:
            self._prefetches.append(_Prefetch(operation, work, LayerRecord(self._record.step, operation.layer)))
        return _as_taken(operation, work)

    def _note_saves(self) -> None:
        """Writes down the write-backs that have ended."""
        for operation, work, record in self._saves:
            if work.error is not None:
                raise work.error
            if work.finished:
                self._event("write-back", record, operation.expert, work)
        self._saves = [one for one in self._saves if not one[1].finished]

    def _outstanding(self) -> int:
        """Copies submitted and not ended."""
        return sum(work.resource == "link" and not work.done for work in self._works.values())

    def _resolve(self, layer: _Layer) -> LayerRecord:
        """Turns a layer's marks and works into seconds and event rows."""
        record, time_of = layer.record, self._device.time_of
        dense_s, begun_s, record.end_s = time_of(layer.dense), time_of(layer.begun), time_of(layer.ended)
        record.dense_s = begun_s - dense_s
        first_s, last_s = record.end_s, begun_s
        self._event_at("gpu", "dense", record, dense_s, begun_s)
        for operation, work in layer.works:
            busy_s = work.end_s - work.start_s
            self._event("copy" if operation.op == COPY else "expert", record, operation.expert, work)
            first_s = min(first_s, work.start_s)
            if operation.op == COPY:
                record.transfer_s += busy_s
                continue
            last_s = max(last_s, work.end_s)
            if operation.op == GPU:
                record.gpu_s += busy_s
            else:
                record.cpu_s += busy_s
        record.host_s = max(0.0, first_s - begun_s) + max(0.0, record.end_s - max(last_s, first_s))
        self._event_at("host", "plan", record, begun_s, first_s)
        return record

    def _event(self, kind: str, record: LayerRecord, expert: int, work: Work) -> None:
        self.log.event(work.resource, kind, record, expert, work.start_s, work.end_s)

    def _event_at(self, resource: str, kind: str, record: LayerRecord, start_s: float, end_s: float) -> None:
        self.log.event(resource, kind, record, -1, start_s, end_s)


_OP_ON = {"gpu": GPU, "cpu": CPU, "link": COPY, "link-back": EVICT}


class _Layer(NamedTuple):
    """A layer whose times are read at the end of its step: marks of its dense part's begin, its router, its end."""

    record: LayerRecord
    works: list[tuple[Operation, Work]]
    dense: Any
    begun: Any
    ended: Any


class _Prefetch:
    """A prefetch under way, with the layer that it is for."""

    def __init__(self, operation: Operation, work: Work, record: LayerRecord) -> None:
        self.operation, self.work, self.record = operation, work, record
        self.reported = False


class _StepBook:
    """Numbers forward passes and sequences as they come by; every prefill begins new sequences, one a lane."""

    def __init__(self) -> None:
        self.index = -1
        self._sequences = 0
        self._first = 0
        self._step: Step | None = None

    def begin(self, phase: Phase, mask: Tensor, positions: Tensor) -> Step:
        """A pass over ``mask`` [B, S] of real tokens at ``positions`` [B, S] begins."""
        self.index += 1
        if phase == Phase.PREFILL:
            self._first, self._sequences = self._sequences, self._sequences + len(mask)
        counts = mask.sum(dim=1).tolist()
        active = [lane for lane, count in enumerate(counts) if count]
        sequences = tuple(self._first + lane for lane in active)
        self._step = Step(
            index=self.index,
            phase=phase,
            rows=torch.empty(0, dtype=torch.int64).numpy(),
            sequences=sequences,
            tokens=tuple(counts[lane] for lane in active),
            context=int(positions.max()) + 1,
            starts=sequences if phase == Phase.PREFILL else (),
            ends=(),
        )
        return self._step

    def end(self, next_tokens: list[int]) -> Step:
        """The pass has ended; lanes without a next token end with it."""
        step = self._step
        assert step is not None, "a pass that ends has begun"
        ends = tuple(one for one in step.sequences if next_tokens[one - self._first] == NO_TOKEN)
        return Step(step.index, step.phase, step.rows, step.sequences, step.tokens, step.context, step.starts, ends)


def _experts_forward(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    executor, layer = cast("tuple[Executor, int]", module.moetwin)
    return executor.experts(layer, hidden, ids, weights)


def _as_taken(operation: Operation, work: Work) -> Operation:
    """An operation as the device took it: the log must not follow the plan where the work does not."""
    op = _OP_ON[work.resource]
    return operation if op == operation.op else operation._replace(op=op)
