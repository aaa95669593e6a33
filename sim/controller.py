"""One layer of decisions: the code that the simulated and the real clock both run.

The clock calls, from one thread: :meth:`~OffloadController.begin_step`, then for each MoE layer
:meth:`~OffloadController.plan_layer`, and, while its link has room, :meth:`~OffloadController.next_transfer`. It
reports arrivals of prefetched experts with :meth:`~OffloadController.on_arrival`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sim.cache import ExpertCache, Verdict
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.policies import EVICTION, PLACEMENT, PREFETCH, LayerView, PolicyContext
from sim.policies.base import Future
from sim.systems import Budget, SystemSpec
from traces.workload import Routing


@dataclass(frozen=True)
class ExpertShape:
    """The experts that a controller manages. ``expert_bytes`` is the size of one."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int


@dataclass(frozen=True)
class Predicted:
    """Predicted seconds that a placement policy may weigh: both clocks hand over the same numbers."""

    gpu_expert_s: Callable[[int], float]
    cpu_expert_s: Callable[[int, bool], float]
    copy_s: float


class OffloadController:
    """Applies a system's policies, layer by layer, and keeps the book of the cache."""

    def __init__(
        self, system: SystemSpec, shape: ExpertShape, budget: Budget, predicted: Predicted, future: Future | None = None
    ) -> None:
        context = PolicyContext(shape.layers, shape.experts, shape.top_k, future)
        self.system, self.shape, self.budget = system, shape, budget
        self.cache = ExpertCache(
            shape.layers,
            shape.experts,
            budget.slots,
            shared=system.scope == "global",
            staging=budget.staging,
        )
        self._evict = EVICTION[system.evict](context)
        self._place = PLACEMENT[system.place](context)
        self._prefetch = PREFETCH[system.prefetch](context)
        self._predicted = predicted
        self._next_id = 0
        self._event = -1
        self._current: list[int] = []
        self._wanted: list[tuple[int, int]] = []
        self._predictions: Sequence[Sequence[int]] = ()
        self._layer = -1

    def begin_step(self, step: int) -> None:
        """A forward pass begins; ``step`` counts them over the run."""
        self._event = step * self.shape.layers - 1

    def plan_layer(self, layer: int, routing: Routing, predictions: Sequence[Sequence[int]] = ()) -> LayerPlan:
        """Decides one layer: ``routing`` is what its router chose, ``predictions[d]`` the experts that are expected in
        layer ``layer + 1 + d``, most wanted first. The plan's operations are in order of submission."""
        self._event += 1
        cache, base = self.cache, layer * self.shape.experts
        slot_of, in_flight = cache.slot_of, cache.in_flight
        counts = {base + expert: count for expert, count in zip(routing.experts, routing.counts, strict=True)}
        blocks = list(counts)
        hits: list[int] = []
        late: list[int] = []
        missing: list[int] = []
        for block in blocks:
            if slot_of[block] < 0:
                missing.append(block)
            else:
                (late if block in in_flight else hits).append(block)
        self._evict.observe(self._event, blocks, routing.counts)
        cache.touch(self._event, blocks)
        self._note_predictions(layer, blocks, predictions)
        on_cpu = self._on_cpu(layer, hits, missing, counts) if missing else ()
        builder = _Builder(self, layer, counts)
        if on_cpu:
            gone = set(on_cpu)
            missing = [block for block in missing if block not in gone]
            blocks = [block for block in blocks if block not in gone]
            builder.cpu(on_cpu)
        if missing:
            builder.fetch(hits, late, missing, cache.settle(layer, blocks, missing, self._evict))
        else:
            builder.gpu(hits)
            builder.gpu(late)
        return LayerPlan(
            layer,
            builder.operations,
            routing.assignments,
            len(counts),
            len(hits),
            sum(map(counts.__getitem__, hits)),
            len(late),
            len(missing) + len(on_cpu),
            len(on_cpu),
            len(missing) * self.shape.expert_bytes,
        )

    def next_transfer(self) -> tuple[Operation, ...]:
        """The next prefetch worth starting now, with the eviction that makes room for it; empty when there is none."""
        cache, experts = self.cache, self.shape.experts
        while self._wanted:
            layer, expert = self._wanted.pop()
            block = layer * experts + expert
            if cache.slot_of[block] >= 0:
                continue
            operations = self._make_room(layer)
            if operations is None:
                continue
            slot = cache.insert(block, layer)
            copy = Operation(self.take_id(), COPY, layer, expert, slot, 0, self.shape.expert_bytes, (), True)
            cache.in_flight[block] = copy.id
            return (*operations, copy)
        return ()

    def on_arrival(self, operation: Operation) -> None:
        """A prefetched expert is on the device."""
        del self.cache.in_flight[operation.layer * self.shape.experts + operation.expert]

    def take_id(self) -> int:
        """A number for an operation, unique in the run."""
        self._next_id += 1
        return self._next_id

    def drop(self, block: int) -> Operation:
        """Removes ``block`` from the cache and returns the eviction that says so."""
        slot = self.cache.remove(block)
        self._evict.forget(block)
        layer, expert = divmod(block, self.shape.experts)
        return Operation(self.take_id(), EVICT, layer, expert, slot, 0, 0)

    def _on_cpu(self, layer: int, hits: list[int], missing: list[int], counts: dict[int, int]) -> list[int]:
        base = layer * self.shape.experts
        view = LayerView(
            layer,
            [(block - base, counts[block]) for block in hits],
            [(block - base, counts[block]) for block in missing],
            self.cache.free_slots(layer),
            self._predicted.gpu_expert_s,
            self._predicted.cpu_expert_s,
            self._predicted.copy_s,
        )
        return [base + expert for expert in self._place.on_cpu(view)]

    def _note_predictions(self, layer: int, blocks: list[int], predictions: Sequence[Sequence[int]]) -> None:
        self._current, self._layer, self._predictions = blocks, layer, predictions
        if not self._prefetch.depth:
            return
        ahead = predictions[: max(0, self.shape.layers - 1 - layer)]
        self._wanted = [*self._prefetch.candidates(layer, ahead)][::-1]

    def _make_room(self, layer: int) -> tuple[Operation, ...] | None:
        """Evictions that free a slot for ``layer``, or None when all that is there is needed sooner."""
        if self.cache.free_slots(layer):
            return ()
        protected = self._protected()
        in_flight = self.cache.in_flight
        spare = [b for b in self.cache.residents(layer) if b not in in_flight and b not in protected]
        if not spare:
            return None
        return (self.drop(self.cache.weakest(spare, self._evict)[0]),)

    def _protected(self) -> set[int]:
        experts = self.shape.experts
        ahead = enumerate(self._predictions, self._layer + 1)
        return set(self._current) | {layer * experts + expert for layer, chosen in ahead for expert in chosen}


class _Builder:
    """Puts the operations of one layer in order, and enters them into the cache's book."""

    def __init__(self, controller: OffloadController, layer: int, counts: dict[int, int]) -> None:
        self._controller, self._cache, self._layer, self._counts = controller, controller.cache, layer, counts
        self._base = layer * controller.shape.experts
        self._bytes = controller.shape.expert_bytes
        self.operations: list[Operation] = []

    def cpu(self, blocks: Iterable[int]) -> None:
        """Experts that the CPU computes, in its order."""
        for block in blocks:
            self._add(CPU, block, -1, self._counts[block], 0)

    def gpu(self, blocks: Iterable[int]) -> dict[int, int]:
        """Experts that sit in slots, most tokens first; returns the operation that reads each block."""
        counts, cache = self._counts, self._cache
        reads = {}
        for block in sorted(blocks, key=lambda b: (-counts[b], b)):
            copy = cache.in_flight.get(block)
            reads[block] = self._add(GPU, block, cache.slot_of[block], counts[block], 0, () if copy is None else (copy,))
        return reads

    def fetch(self, hits: list[int], late: list[int], missing: list[int], verdict: Verdict) -> None:
        """A layer with misses: copies that need nothing first, then what is resident, then what arrives."""
        order = sorted(missing, key=lambda b: (-self._counts[b], b))
        kept = set(verdict.admitted)
        admitted = [block for block in order if block in kept]
        streamed = [block for block in order if block not in kept]
        for victim in verdict.victims:
            self.operations.append(self._controller.drop(victim))
        room = self._cache.free_slots(self._layer)
        staged = list(zip(streamed, self._cache.staging, strict=False))
        copies = {block: self._admit(block) for block in admitted[:room]}
        copies |= {block: self._copy(block, slot) for block, slot in staged}
        reads = self.gpu(hits)
        self.gpu(late)
        for block, leaver in zip(admitted[room:], verdict.leaving, strict=True):
            self.operations.append(self._controller.drop(leaver))
            copies[block] = self._admit(block, after=(reads[leaver],))
        for block in admitted:
            self._add(GPU, block, self._cache.slot_of[block], self._counts[block], 0, (copies[block],))
        self._stream(streamed, copies)

    def _stream(self, streamed: list[int], copies: dict[int, int]) -> None:
        """Experts that are not kept pass through the staging slots, each copy after the read of its predecessor."""
        staging = self._cache.staging
        for index, block in enumerate(streamed):
            slot = staging[index % len(staging)]
            read = self._add(GPU, block, slot, self._counts[block], 0, (copies[block],))
            if index + len(staging) < len(streamed):
                follower = streamed[index + len(staging)]
                copies[follower] = self._copy(follower, slot, after=(read,))

    def _admit(self, block: int, after: tuple[int, ...] = ()) -> int:
        return self._copy(block, self._cache.insert(block, self._layer), after)

    def _copy(self, block: int, slot: int, after: tuple[int, ...] = ()) -> int:
        return self._add(COPY, block, slot, 0, self._bytes, after)

    def _add(self, op: str, block: int, slot: int, tokens: int, size: int, after: tuple[int, ...] = ()) -> int:
        number = self._controller.take_id()
        self.operations.append(Operation(number, op, self._layer, block - self._base, slot, tokens, size, after))
        return number
