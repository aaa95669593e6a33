"""One layer of decisions: the code that the simulated and the real clock both run.

The clock calls, from one thread: :meth:`~OffloadController.begin_step`, then for each MoE layer
:meth:`~OffloadController.plan_layer`, and, while its link has room, :meth:`~OffloadController.next_transfer`. It
reports arrivals of prefetched experts with :meth:`~OffloadController.on_arrival`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from sim.cache import ExpertCache, Verdict
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation
from sim.policies import EVICTION, PLACEMENT, PREFETCH, EvictionPolicy, LayerView, PolicyContext
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
        self._draft = _Draft(self.cache, self._evict, shape)
        self._event = -1
        self._layer = -1
        self._current: Collection[int] = ()
        self._wanted: list[tuple[int, int]] = []
        self._predictions: Sequence[Sequence[int]] = ()

    def begin_step(self, step: int) -> None:
        """A forward pass begins; ``step`` counts them over the run."""
        self._event = step * self.shape.layers - 1

    def plan_layer(self, layer: int, routing: Routing, predictions: Sequence[Sequence[int]] = ()) -> LayerPlan:
        """Decides one layer: ``routing`` is what its router chose, ``predictions[d]`` the experts that are expected in
        layer ``layer + 1 + d``, most wanted first. The plan's operations are in order of submission."""
        load = self._take_in(layer, routing)
        hits, late, missing = self._classified(load)
        self._note_predictions(layer, load, predictions)
        on_cpu = self._on_cpu(layer, hits, missing, load) if missing and self._place.uses_cpu else ()
        fetched = [block for block in missing if block not in on_cpu] if on_cpu else missing
        draft = self._draft
        draft.begin(layer, load)
        if on_cpu:
            draft.cpu(on_cpu)
        if fetched:
            draft.fetch(hits, late, self.cache.settle(layer, load, fetched, self._evict))
        else:
            draft.gpu(hits)
            draft.gpu(late)
        hit_tokens = len(hits) if routing.assignments == len(load) else sum(map(load.__getitem__, hits))
        counts = (len(load), len(hits), hit_tokens, len(late), len(missing), len(on_cpu))
        size_bytes = len(fetched) * self.shape.expert_bytes
        return tuple.__new__(LayerPlan, (layer, draft.operations, routing.assignments, *counts, size_bytes))

    def next_transfer(self) -> tuple[Operation, ...]:
        """The next prefetch worth starting now, with the eviction that makes room for it; empty when there is none."""
        cache, experts = self.cache, self.shape.experts
        while self._wanted:
            layer, expert = self._wanted.pop()
            block = layer * experts + expert
            if cache.slot_of[block] >= 0:
                continue
            victim = self._victim(layer)
            if victim is None:
                continue
            return self._draft.prefetch(layer, block, victim)
        return ()

    def on_arrival(self, operation: Operation) -> None:
        """A prefetched expert is on the device."""
        del self.cache.in_flight[operation.layer * self.shape.experts + operation.expert]

    def _take_in(self, layer: int, routing: Routing) -> dict[int, int]:
        """Tells policies and cache of the event; returns block -> tokens, most tokens first, then the lowest id."""
        self._event += 1
        base = layer * self.shape.experts
        blocks = [base + expert for expert in routing.experts]
        self._evict.observe(self._event, blocks, routing.counts)
        self.cache.touch(self._event, blocks)
        load = dict(zip(blocks, routing.counts, strict=True))
        if routing.assignments == len(blocks):
            return load
        return dict(sorted(load.items(), key=lambda item: (-item[1], item[0])))

    def _classified(self, load: dict[int, int]) -> tuple[list[int], list[int], list[int]]:
        """Splits an event's blocks into what is resident, what is on its way, and what is missing."""
        slot_of, in_flight = self.cache.slot_of, self.cache.in_flight
        hits: list[int] = []
        late: list[int] = []
        missing: list[int] = []
        for block in load:
            if slot_of[block] < 0:
                missing.append(block)
            elif block in in_flight:
                late.append(block)
            else:
                hits.append(block)
        return hits, late, missing

    def _on_cpu(self, layer: int, hits: list[int], missing: list[int], load: dict[int, int]) -> Sequence[int]:
        base = layer * self.shape.experts
        view = LayerView(
            layer,
            [(block - base, load[block]) for block in hits],
            [(block - base, load[block]) for block in missing],
            self.cache.free_slots(layer),
            self._predicted.gpu_expert_s,
            self._predicted.cpu_expert_s,
            self._predicted.copy_s,
        )
        return [base + expert for expert in self._place.on_cpu(view)]

    def _note_predictions(self, layer: int, blocks: Collection[int], predictions: Sequence[Sequence[int]]) -> None:
        if not self._prefetch.depth:
            return
        self._current, self._layer, self._predictions = blocks, layer, predictions
        ahead = predictions[: max(0, self.shape.layers - 1 - layer)]
        self._wanted = [*self._prefetch.candidates(layer, ahead)][::-1]

    def _victim(self, layer: int) -> int | None:
        """The block that a prefetch for ``layer`` may push out: -1 where a slot is free, None where all that is there
        is needed sooner."""
        cache = self.cache
        if cache.free_slots(layer):
            return -1
        protected = self._protected()
        spare = [block for block in cache.residents(layer) if block not in cache.in_flight and block not in protected]
        return cache.weakest(spare, self._evict)[0] if spare else None

    def _protected(self) -> set[int]:
        experts = self.shape.experts
        ahead = enumerate(self._predictions, self._layer + 1)
        return set(self._current) | {layer * experts + expert for layer, chosen in ahead for expert in chosen}


class _Draft:
    """Numbers operations, puts those of one layer in order, and enters them into the cache's book.

    Operations are made by ``tuple.__new__``: a run makes them by the million, and a call of the class takes twice as
    long.
    """

    def __init__(self, cache: ExpertCache, evict: EvictionPolicy, shape: ExpertShape) -> None:
        self._cache, self._evict, self._shape = cache, evict, shape
        self._number = 0
        self.begin(0, {})

    def begin(self, layer: int, load: dict[int, int]) -> None:
        """Starts the plan of ``layer``, whose blocks get ``load[block]`` tokens."""
        self._layer, self._load, self._base = layer, load, layer * self._shape.experts
        self.operations: list[Operation] = []

    def cpu(self, blocks: Iterable[int]) -> None:
        """Experts that the CPU computes, in its order; they are used without being kept."""
        for block in blocks:
            self._add(CPU, block, -1, self._load[block], 0)
            self._evict.forget(block)

    def gpu(self, blocks: Iterable[int]) -> dict[int, int]:
        """Experts that sit in slots, or will when their prefetch arrives; returns the operation that reads each."""
        load, slot_of, in_flight = self._load, self._cache.slot_of, self._cache.in_flight
        reads = {}
        for block in blocks:
            after = (in_flight[block],) if block in in_flight else ()
            reads[block] = self._add(GPU, block, slot_of[block], load[block], 0, after)
        return reads

    def fetch(self, hits: list[int], late: list[int], verdict: Verdict) -> None:
        """A layer with misses: copies that need nothing first, then what is resident, then what arrives."""
        admitted, streamed, victims, leaving = verdict
        for victim in victims:
            self.operations.append(self._dropped(victim))
        at_once = len(admitted) - len(leaving)
        copies = {block: self._admit(block) for block in admitted[:at_once]}
        for block, slot in zip(streamed, self._cache.staging, strict=False):
            copies[block] = self._copy(block, slot)
        reads = self.gpu(hits)
        self.gpu(late)
        for block, leaver in zip(admitted[at_once:], leaving, strict=True):
            self.operations.append(self._dropped(leaver))
            copies[block] = self._admit(block, (reads[leaver],))
        slot_of, load = self._cache.slot_of, self._load
        for block in admitted:
            self._add(GPU, block, slot_of[block], load[block], 0, (copies[block],))
        if streamed:
            self._stream(streamed, copies)

    def prefetch(self, layer: int, block: int, victim: int) -> tuple[Operation, ...]:
        """The copy of ``block``, after the eviction of ``victim`` unless that is -1."""
        evictions = () if victim < 0 else (self._dropped(victim),)
        slot = self._cache.insert(block, layer)
        number = self._take_number()
        expert = block - layer * self._shape.experts
        self._cache.in_flight[block] = number
        return (*evictions, Operation(number, COPY, layer, expert, slot, 0, self._shape.expert_bytes, (), True))

    def _stream(self, streamed: list[int], copies: dict[int, int]) -> None:
        """Experts that are not kept pass through the staging slots, each copy after the read of its predecessor."""
        staging = self._cache.staging
        for index, block in enumerate(streamed):
            slot = staging[index % len(staging)]
            read = self._add(GPU, block, slot, self._load[block], 0, (copies[block],))
            self._evict.forget(block)
            if index + len(staging) < len(streamed):
                follower = streamed[index + len(staging)]
                copies[follower] = self._copy(follower, slot, (read,))

    def _admit(self, block: int, after: tuple[int, ...] = ()) -> int:
        return self._copy(block, self._cache.insert(block, self._layer), after)

    def _copy(self, block: int, slot: int, after: tuple[int, ...] = ()) -> int:
        return self._add(COPY, block, slot, 0, self._shape.expert_bytes, after)

    def _dropped(self, block: int) -> Operation:
        """Removes ``block`` from the cache and returns the eviction that says so."""
        slot = self._cache.remove(block)
        self._evict.forget(block)
        layer, expert = divmod(block, self._shape.experts)
        return tuple.__new__(Operation, (self._take_number(), EVICT, layer, expert, slot, 0, 0, (), False))

    def _add(self, op: str, block: int, slot: int, tokens: int, size_bytes: int, after: tuple[int, ...] = ()) -> int:
        self._number = number = self._number + 1
        fields = (number, op, self._layer, block - self._base, slot, tokens, size_bytes, after, False)
        self.operations.append(tuple.__new__(Operation, fields))
        return number

    def _take_number(self) -> int:
        self._number += 1
        return self._number
