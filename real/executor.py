"""Runs a controller's plans with torch, in the place of a model's experts, and writes down what really happened.

Shapes: T rows of a forward pass (padding included), k experts a token, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from real.book import StepBook
from real.device import Chunks, Device, Run, Work
from real.grouped import Together, together
from real.kernels import Kernel, kernel_for
from real.models.load import LoadedModel
from real.own_time import OwnTime, RouterApart
from real.routing import RouteListener, RouterCall, RouterTap, lookahead, router_scores
from real.store import DeviceSlots, HostStore
from real.timing import TimedLayer
from sim.controller import OffloadController
from sim.engine import BEFORE
from sim.logs import LayerRecord, RunLog
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.queues import LINK_WINDOW
from sim.run import most_named
from traces.schema import Phase
from traces.workload import Routing, Step

IMPLEMENTATION = "moetwin_offload"
"""Name under which the executor stands in the experts interface of transformers."""

NOTHING_ROUTED = Routing((), (), 0)
Predictions = Sequence[Sequence[tuple[int, int]]]


class Executor:
    """Stands in for the experts of a model for the time of a ``with`` block. One executor serves one run.

    Give it to ``generate`` as hooks. With ``forecast`` the predictions for the layers after a given one come from
    there, and with ``scores`` a layer's router scores (routing replay); the later layers' routers are run, and the
    model's own scores are read, all the same, because that is a part of the cost. With
    ``steps`` the forward passes are those of a known workload, and are written down under its sequence numbers.
    ``router_means`` [L, H] correct the look-ahead, as :func:`real.routing.lookahead` does. A layer's resident experts
    are computed together where :func:`real.grouped.together` allows it, which takes ``grouped``; ``notes`` tells what a
    reader of the run has to know of that.
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
        router_means: Tensor | None = None,
        grouped: bool | None = None,
    ) -> None:
        self.log = RunLog()
        self.slots = slots or DeviceSlots(store, controller.cache.total_slots, device.torch_device)
        self._loaded, self._controller, self._device, self._store = loaded, controller, device, store
        self._forecast, self._scores_at, self._known = forecast, scores, steps
        self._scored = "scores" in controller.system.needs
        self._scores: Any = None
        self._run_expert = store.form.run
        self._own = OwnTime(device)
        self._routers = cast("list[nn.Module]", [RouterApart(layer.router, self._own) for layer in loaded.layers])
        self._listeners, self._router_means = listeners, router_means
        self._synchronous = controller.system.synchronous
        self._grouped = False if self._synchronous else grouped
        self._together: Together | None = None
        self.notes: list[str] = []
        self._depth = controller.system.lookahead_depth
        self._prefetching = controller.system.prefetch != "none" and not self._synchronous
        self._predictions: Predictions = ()
        self._book = StepBook()
        self._real: Tensor | None = None
        self._bounds = _bounds(store.expert(0, 0), device.chunk_bytes, device.pieces)
        self._works: dict[int, Work] = {}
        self._loads: dict[int, Work] = {}  # by slot: what has filled it last
        self._reads: dict[int, Work] = {}  # by slot: what has read it last
        self._prefetches: list[_Prefetch] = []
        self._saves: list[tuple[Operation, Work, LayerRecord]] = []
        self._layers: list[TimedLayer] = []
        self._record = LayerRecord(0, 0)
        self._step_mark: Any = None
        self._dense_mark: Any = None

    def __enter__(self) -> Executor:
        self._together, self.notes = together(self._store, self.slots, self._device, self._grouped)
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
        self._implementation = self._loaded.config._experts_implementation
        for layer in self._loaded.layers:
            layer.experts.moetwin = (self, layer.index)  # type: ignore[assignment]
        self._loaded.model.set_experts_implementation(IMPLEMENTATION)
        told = [*self._listeners, *([self] if self._scored or self._depth else [])]
        self._tap = RouterTap(self._loaded.layers if told else (), *told).__enter__()
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
        self._device.settle()  # the slots are cleared by compute, which must not meet the copies
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
        records = [layer.resolve(self.log, self._device.time_of) for layer in self._layers]
        self._layers.clear()
        self._poll()
        self._note_saves()
        head = LayerRecord(self._book.index, len(records))
        self.log.event("gpu", "head", head, -1, records[-1].end_s, end_s)
        step = self._book.end(next_tokens)
        step = step if self._known is None else self._known[step.index]
        self.log.step(step, start_s, end_s, end_s - records[-1].end_s, records)

    def on_route(self, call: RouterCall) -> None:
        """Reads a router's scores and looks ahead from its input when the system needs it; never changes the choice."""
        self._own.begin()
        if self._scored:
            self._await_compute()
            scores = router_scores(call.logits)
            real = scores if self._real is None else scores[self._real.cpu().numpy()]
            self._scores = real.astype("float64") if self._scores_at is None else self._scores_at(call.layer)
        if self._depth:
            width, means = call.ids.shape[-1], self._router_means
            ids = lookahead(call.hidden, call.layer, self._depth, self._routers, width, means)
            self._predictions = self._named(ids) if self._forecast is None else self._forecast(call.layer)
        self._own.end()

    def _named(self, ids: Tensor) -> Predictions:
        """How often each expert is named in ids [T, D, k] for real tokens, by distance."""
        self._await_compute()
        began_s = perf_counter()
        rows = ids if self._real is None else ids[self._real]  # on a GPU the host waits for how many these are
        named = rows.transpose(0, 1).flatten(1).tolist()
        self._own.leave_out(perf_counter() - began_s)
        return [most_named(experts) for experts in named]

    def experts(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The output [T, H] of one layer's experts for ``hidden`` [T, H], ``ids`` and ``weights`` [T, k]."""
        if len(self._layers) < layer:
            self._pass_over(layer)
        self._own.begin()
        begun = self._device.mark()
        if self._prefetches:
            self._device.flush()  # so that the link has work while the choice is awaited
        kernel = kernel_for(self.compute, hidden, ids, weights, self._real, self._await_compute)
        self._own.leave_out(kernel.read_s)
        if self._prefetches:
            self._poll()
            self._withdraw(layer, kernel.routing)
        routing = kernel.routing._replace(scores=self._scores) if self._scored else kernel.routing
        record = self._record = LayerRecord(self._book.index, layer)
        record.plan = plan = self._controller.plan_layer(layer, routing, self._predictions)
        works = self._submit(plan, kernel, record)
        computed = [work for operation, work in works if operation.op != COPY]
        self._wait(computed, self._pull if self._prefetching else None)
        result = kernel.result()
        self._works = {number: work for number, work in self._works.items() if work.resource in LINKS and not work.done}
        ended = self._device.mark()
        self._layers.append(TimedLayer(record, works, self._dense_mark, begun, ended))
        self._dense_mark = ended
        self._own.end()
        record.python_s = self._own.take()
        return result

    def _pass_over(self, layer: int) -> None:
        """Plans the layers before ``layer`` that this pass did not call, an encoder's, as nothing is routed there."""
        for passed in range(len(self._layers), layer):
            record, mark = LayerRecord(self._book.index, passed), self._dense_mark
            record.plan = self._controller.plan_layer(passed, NOTHING_ROUTED)
            self._layers.append(TimedLayer(record, [], mark, mark, mark))

    def compute(self, operation: Operation, hidden: Tensor) -> Tensor:
        """One expert on rows [n, H]: on the device from its slot, or on the CPU from the host store."""
        if operation.op == GPU:
            weights = self.slots.read(operation.slot, operation.layer, operation.expert)
        else:
            weights = self._store.views(self._store.expert(operation.layer, operation.expert))
        return self._run_expert(weights, hidden)

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
        if self._prefetches:
            self._promote(plan)
        works, step, note, begun = [], record.step, self.log.operation, self._works
        group = self._together.among(plan.operations) if self._together else None
        for operation in plan.operations:
            if operation.op == EVICT and not operation.bytes:
                note(step, operation)
                continue
            if group and operation.op == GPU and not operation.after:
                work = begun.get(operation.id) or self._start_together(group, kernel)
            else:
                work = begun[operation.id] = self._start(operation, kernel)
            note(step, _as_taken(operation, work))
            if operation.op != EVICT:
                works.append((operation, work))
            if self._synchronous:
                self._wait([work], alone=True)
        if self._prefetching:
            self._pull()
        return works

    def _wait(self, works: Sequence[Work], on_copy: Run | None = None, *, alone: bool = False) -> None:
        """Waits; ``alone``: until nothing else is under way, also where devices only order."""
        self._device.wait(works, on_copy)
        if alone:
            self._device.settle()

    def _await_compute(self) -> None:
        """Waits for the GPU to have come here; the link gets further prefetches meanwhile."""
        self._device.await_compute(self._pull if self._prefetching else None)

    def _start(self, operation: Operation, kernel: Kernel) -> Work:
        if operation.op == GPU:
            work = self._device.gpu(partial(kernel.run, operation), self._awaited(operation))
            self._reads[operation.slot] = work
            return work
        if operation.op == CPU:
            return self._device.cpu(kernel.on_cpu(operation))
        return self._save(operation) if operation.op == EVICT else self._load(operation)

    def _start_together(self, group: Sequence[Operation], kernel: Kernel) -> Work:
        """Starts what waits for nothing, at the place of the first: whatever follows any of them follows them all."""
        assert self._together is not None
        work = self._device.gpu(partial(kernel.run_together, group, self._together.compute), ())
        for operation in group:
            self._works[operation.id] = self._reads[operation.slot] = work
        return work

    def _load(self, operation: Operation) -> Work:
        """Starts a copy to the device, after what has read the slot last; a prefetch goes in chunks."""
        slot, place = operation.slot, (operation.slot, operation.layer, operation.expert)
        load: Run | Chunks = partial(self.slots.load, *place)
        if operation.prefetch and len(self._bounds) > 1:
            load = [partial(self.slots.load_part, *place, start, stop) for start, stop in self._bounds]
        after = self._awaited(operation)
        if slot in self._reads and not self._reads[slot].done:
            after.append(self._reads[slot])
        work = self._loads[slot] = self._device.copy(load, after, prefetch=operation.prefetch)
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
            for stretch in one.work.stretches or [(one.work.start_s, one.work.end_s)]:
                self.log.event("link", "prefetch", one.record, one.operation.expert, *stretch)

    def _withdraw(self, layer: int, routing: Routing) -> None:
        """Takes back prefetches that have not begun and, with the choice of this layer known, are stale."""
        stale = [one.work for one in self._prefetches if self._controller.is_stale(one.operation, layer, routing)]
        taken = self._device.withdraw(stale)
        for one in [one for one in reversed(self._prefetches) if one.work in taken]:
            self._prefetches.remove(one)
            del self._works[one.operation.id]
            self.log.withdrawn(one.operation)
            self._controller.on_withdrawal(one.operation)

    def _pull(self) -> None:
        """Asks for prefetches while the link has room."""
        self._poll()
        while self._outstanding() < LINK_WINDOW and (operations := self._controller.next_transfer()):
            for operation in operations:
                self.log.operation(self._record.step, self._ahead(operation))

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
                self.log.event(work.resource, "write-back", record, operation.expert, work.start_s, work.end_s)
        self._saves = [one for one in self._saves if not one[1].finished]

    def _outstanding(self) -> int:
        """Copies submitted and not ended."""
        return sum(work.resource == "link" and not work.done for work in self._works.values())


LINKS = ("link", "link-back")
"""Resources whose work may outlast its layer: what waits for a computation is of the same layer."""
_OP_ON = {"gpu": GPU, "cpu": CPU, "link": COPY, "link-back": EVICT}


class _Prefetch:
    """A prefetch under way, with the layer that it is for."""

    def __init__(self, operation: Operation, work: Work, record: LayerRecord) -> None:
        self.operation, self.work, self.record = operation, work, record
        self.reported = False


def _experts_forward(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    executor, layer = cast("tuple[Executor, int]", module.moetwin)
    return executor.experts(layer, hidden, ids, weights)


def _bounds(flat: Tensor, chunk_bytes: int, pieces: int = 1) -> list[tuple[int, int]]:
    """Where each of the pieces begins and ends in which a flat expert is prefetched, in elements: a chunk, or an expert
    of less, goes in so many pieces. ``chunk_bytes`` 0: in one."""
    elements = len(flat)
    chunk = max(1, min(chunk_bytes, flat.nbytes) // flat.element_size() // pieces) if chunk_bytes else elements
    return [*pairwise([*range(0, elements, chunk), elements])]


def _as_taken(operation: Operation, work: Work) -> Operation:
    """An operation as the device took it: the log must not follow the plan where the work does not."""
    op = _OP_ON[work.resource]
    return operation if op == operation.op else operation._replace(op=op)
