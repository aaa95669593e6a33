"""One layer of decisions: the code that the simulated and the real clock both run.

The clock calls, from one thread: :meth:`~OffloadController.begin_step`, then for each MoE layer
:meth:`~OffloadController.plan_layer`, and, while its link has room, :meth:`~OffloadController.next_transfer`. It
reports arrivals of prefetched experts with :meth:`~OffloadController.on_arrival`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sim.cache import ExpertCache, Verdict
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan, Operation, operation_of
from sim.policies import EvictionPolicy, LayerView, PolicyContext
from sim.policies.base import Assignment, Calibration, Future, Policy, PrefetchView
from sim.policies.place.split import makespan_s, split
from sim.systems import Budget, SystemSpec
from traces.workload import Routing

NOTHING: list[int] = []
"""The CPU's experts where the placement does not use it."""


@dataclass(frozen=True)
class ExpertShape:
    """The experts that a controller manages. ``expert_bytes`` is the size of one."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int


@dataclass(frozen=True)
class Predicted:
    """Predicted seconds that a placement policy may weigh: both clocks hand over the same numbers.

    ``gpu_free_s`` is what the GPU still has to do when a layer is placed, before it comes to the routed experts:
    nothing, as long as shared experts are part of the dense work that the host waits for. ``router_s`` is what passes
    from the end of a layer's experts until the next router's choice is known.
    """

    gpu_expert_s: Callable[[int], float]
    cpu_expert_s: Callable[[int, bool], float]
    copy_s: float
    gpu_free_s: float = 0.0
    router_s: float = 0.0


class OffloadController:
    """Applies a system's policies, layer by layer, and keeps the book of the cache."""

    def __init__(
        self,
        system: SystemSpec,
        shape: ExpertShape,
        budget: Budget,
        predicted: Predicted,
        future: Future | None = None,
        calibration: Calibration | None = None,
        seed: int = 0,
    ) -> None:
        """``future`` and ``calibration`` are for policies that need them, ``seed`` for what they draw at random."""
        shared = system.scope == "global"
        context = PolicyContext(
            shape.layers,
            shape.experts,
            shape.top_k,
            future,
            calibration,
            capacity=budget.slots,
            weights=(1,) * shape.layers,
            shared=shared,
            seed=seed,
        )
        self.system, self.shape, self.budget = system, shape, budget
        self.cache = ExpertCache(
            shape.layers, shape.experts, budget.by_layer or budget.slots, shared=shared, staging=budget.staging
        )
        self._evict = system.eviction(context)
        self._place = system.placement(context)
        self._prefetch = system.prefetching(context)
        told: list[Policy] = [self._evict, self._prefetch]
        self._hear_sequences = [one for one in told if _hears(one, "begin_sequence")]
        self._hear_scores = [one for one in told if "scores" in one.needs]
        self._hear_uses = [one for one in told if _hears(one, "observe")]
        self._looks_ahead = system.prefetch != "none" and not system.synchronous
        self._predicted = predicted
        self._draft = _Draft(self.cache, self._evict, shape, write_back=system.write_back)
        self._layer_s = lru_cache(maxsize=8192)(self._scheduled_s)
        self.fallbacks = 0
        """Layers in which one device alone was quicker than the placement's own schedule."""
        self._event = -1
        self._wanted: list[int] = []
        self._protected: set[int] = set()

    def preload(self) -> list[Operation]:
        """What is loaded before the first step, as the eviction policy wants it: copies, which nothing waits for."""
        return self._draft.preload(self._evict.preload())

    def begin_step(self, step: int, *, new_batch: bool = False) -> None:
        """A forward pass begins; ``step`` counts them over the run. ``new_batch``: none of its sequences ran before."""
        self._event = step * self.shape.layers - 1
        if new_batch:
            for policy in self._hear_sequences:
                policy.begin_sequence()

    def plan_layer(self, layer: int, routing: Routing, expected: Sequence[Sequence[tuple[int, int]]] = ()) -> LayerPlan:
        """Decides one layer: ``routing`` is what its router chose, ``expected[d]`` the (expert, tokens) that are
        predicted for layer ``layer + 1 + d``, most tokens first. The plan's operations are in order of submission."""
        load = self._take_in(layer, routing)
        parts = hits, late, missing = self.cache.look_up(self._event, load)
        assigned = None
        if self._place.uses_cpu and (missing or self._place.takes_hits):
            assigned = self._assign(layer, load, parts)
            base = layer * self.shape.experts
            on_cpu, on_gpu, fetched = ([base + one for one in part] for part in assigned[0][:3])
        else:
            on_cpu, on_gpu, fetched = NOTHING, [*hits, *late, *missing], missing
        verdict = self.cache.settle(layer, load, fetched, self._evict) if fetched else None
        draft = self._draft
        draft.begin(layer, load)
        if on_cpu:
            draft.cpu(on_cpu)
        if verdict:
            draft.fetch(on_gpu, verdict)
        else:
            draft.gpu(on_gpu, self.cache.in_flight)
        if self._looks_ahead:
            times_s = self._times(layer, load, parts, assigned) if self._prefetch.weighs_time else (0.0, 0.0)
            self._look_ahead(layer, load, expected, *times_s)
        hit_tokens = sum(map(load.__getitem__, hits)) if routing.assignments > len(load) else len(hits)
        return _plan_of(
            (
                layer,
                draft.operations,
                routing.assignments,
                len(load),
                len(hits),
                hit_tokens,
                len(late),
                len(missing),
                len(on_cpu),
                len(fetched) * self.shape.expert_bytes,
            )
        )

    def next_transfer(self) -> tuple[Operation, ...]:
        """The next prefetch worth starting now, with the eviction that makes room for it; empty when there is none."""
        while self._wanted:
            block = self._wanted.pop()
            if self.cache.slot_of[block] >= 0:
                continue
            layer = block // self.shape.experts
            victim = self._victim(layer)
            if victim is None:
                continue
            return self._draft.prefetch(layer, block, victim)
        return ()

    def on_arrival(self, operation: Operation) -> None:
        """A prefetched expert is on the device."""
        del self.cache.in_flight[operation.layer * self.shape.experts + operation.expert]

    def _take_in(self, layer: int, routing: Routing) -> dict[int, int]:
        """Tells the policy of the event; returns block -> tokens, most tokens first, then the lowest id."""
        self._event += 1
        base = layer * self.shape.experts
        experts, counts, assignments, scores = routing
        blocks = [base + expert for expert in experts]
        for policy in self._hear_scores:
            policy.observe_scores(layer, scores)
        for policy in self._hear_uses:
            policy.observe(self._event, blocks, counts)
        if assignments == len(blocks):
            return dict.fromkeys(blocks, 1)
        load = zip(blocks, counts, strict=True)
        return dict(sorted(load, key=lambda item: (-item[1], item[0])))

    def _assign(
        self, layer: int, load: Mapping[int, int], parts: tuple[list[int], list[int], list[int]]
    ) -> tuple[Assignment, LayerView]:
        """Asks the placement policy who computes what; ``parts`` are the blocks that hit, are late, and miss."""
        view = self._view(layer, load, parts)
        assignment = self._place.place(view)
        self.fallbacks += assignment.fallback
        return assignment, view

    def _view(self, layer: int, load: Mapping[int, int], parts: tuple[list[int], list[int], list[int]]) -> LayerView:
        base, predicted = layer * self.shape.experts, self._predicted
        hits, late, misses = [tuple([(block - base, load[block]) for block in part]) for part in parts]
        arrivals_s, link_free_s = self._arrivals(parts[1]) if self.cache.in_flight else ((), 0.0)
        return LayerView(
            layer,
            hits,
            misses,
            self.cache.free_slots(layer),
            predicted.gpu_expert_s,
            predicted.cpu_expert_s,
            predicted.copy_s,
            late,
            arrivals_s,
            predicted.gpu_free_s,
            link_free_s,
        )

    def _arrivals(self, late: list[int]) -> tuple[tuple[float, ...], float]:
        """By when each of ``late`` is there, and the link free for copies: what began first is brought to its end, and
        what is waited for goes before new copies, in the order in which it was asked for."""
        begun = next(iter(self.cache.in_flight))
        queue = [block for block in self.cache.in_flight if block == begun or block in late]
        copy_s = self._predicted.copy_s
        return tuple([(queue.index(block) + 1) * copy_s for block in late]), len(queue) * copy_s

    def _look_ahead(
        self,
        layer: int,
        load: Collection[int],
        expected: Sequence[Sequence[tuple[int, int]]],
        link_free_s: float,
        router_s: float,
    ) -> None:
        """Asks the prefetch policy what it wants from now on; what it wanted before and did not get is dropped."""
        ahead = expected[: max(0, self.shape.layers - 1 - layer)]
        slot_of, experts = self.cache.slot_of, self.shape.experts
        view = PrefetchView(
            self._event,
            layer,
            ahead,
            lambda block: slot_of[block] >= 0,
            self._layer_s,
            self._predicted.copy_s,
            link_free_s,
            router_s,
        )
        wanted = self._prefetch.candidates(view)
        self._wanted = [*wanted][::-1]
        named = (base * experts + expert for base, chosen in enumerate(ahead, layer + 1) for expert, _ in chosen)
        self._protected = {*load, *wanted, *named}

    def _times(
        self,
        layer: int,
        load: Mapping[int, int],
        parts: tuple[list[int], list[int], list[int]],
        assigned: tuple[Assignment, LayerView] | None,
    ) -> tuple[float, float]:
        """Predicted seconds until the link has brought this layer's copies, and until the next router has chosen."""
        if assigned is None:
            view = self._view(layer, load, parts)
            assigned = split(view, ()), view
        assignment, view = assigned
        link_free_s = view.link_free_s + len(assignment.copies) * view.copy_s
        return link_free_s, makespan_s(view, assignment) + self._predicted.router_s

    def _scheduled_s(self, hits: tuple[int, ...], misses: tuple[int, ...]) -> float:
        """Seconds of a layer whose experts have these tokens, as the placement would have it; experts go by rank."""
        predicted, ranks = self._predicted, [*range(len(hits) + len(misses))]
        view = LayerView(
            0,
            tuple(zip(ranks, hits, strict=False)),
            tuple(zip(ranks[len(hits) :], misses, strict=False)),
            0,
            predicted.gpu_expert_s,
            predicted.cpu_expert_s,
            predicted.copy_s,
            gpu_free_s=predicted.gpu_free_s,
        )
        return makespan_s(view, self._place.place(view) if self._place.uses_cpu else split(view, ()))

    def _victim(self, layer: int) -> int | None:
        """The block that a prefetch for ``layer`` may push out: -1 where a slot is free, None where all that is there
        is needed sooner."""
        cache = self.cache
        if cache.free_slots(layer):
            return -1
        spare = [
            block for block in cache.residents(layer) if block not in cache.in_flight and block not in self._protected
        ]
        return cache.weakest(spare, self._evict)[0] if spare else None


def _hears(policy: Policy, hook: str) -> bool:
    """Whether a policy listens: most leave most hooks as they are, and are not called."""
    return getattr(type(policy), hook) is not getattr(Policy, hook)


_plan_of: Callable[[tuple[Any, ...]], LayerPlan] = partial(tuple.__new__, LayerPlan)


class _Draft:
    """Numbers operations, puts those of one layer in order, and enters them into the cache's book."""

    def __init__(self, cache: ExpertCache, evict: EvictionPolicy, shape: ExpertShape, *, write_back: bool) -> None:
        self._cache, self._evict, self._experts, self._bytes = cache, evict, shape.experts, shape.expert_bytes
        self._written_bytes = shape.expert_bytes if write_back else 0
        self._saved_by: dict[int, int] = {}  # by slot: the operation that saves what it held
        self._tells = type(evict).admit is not EvictionPolicy.admit  # most policies do not listen
        self._number = 0
        self.begin(0, {})

    def begin(self, layer: int, load: dict[int, int]) -> None:
        """Starts the plan of ``layer``, whose blocks get ``load[block]`` tokens."""
        self._layer, self._load, self._base = layer, load, layer * self._experts
        self.operations: list[Operation] = []

    def preload(self, blocks: Iterable[int]) -> list[Operation]:
        """Copies of ``blocks`` to free slots."""
        operations = []
        for block in blocks:
            layer = block // self._experts
            self.begin(layer, {})
            self._admit((block,))
            operations += self.operations
        return operations

    def cpu(self, blocks: Sequence[int]) -> None:
        """Experts that the CPU computes, in its order: a resident one stays, another is used without being kept."""
        for number, block in enumerate(blocks, self._number + 1):
            fields = (number, CPU, self._layer, block - self._base, -1, self._load[block], 0, (), False)
            self.operations.append(operation_of(fields))
            if self._cache.slot_of[block] < 0:
                self._evict.forget(block)
        self._number += len(blocks)

    def gpu(self, blocks: Sequence[int], copies: Mapping[int, int]) -> None:
        """Experts in their slots; ``copies`` names the operations that bring those which are not there yet."""
        layer, base, load, slot_of = self._layer, self._base, self._load, self._cache.slot_of
        add = self.operations.append
        for number, block in enumerate(blocks, self._number + 1):
            after = (copies[block],) if block in copies else ()
            add(operation_of((number, GPU, layer, block - base, slot_of[block], load[block], 0, after, False)))
        self._number += len(blocks)

    def fetch(self, blocks: list[int], verdict: Verdict) -> None:
        """The GPU's experts in its order, after copies of those that are missing; these need nothing first."""
        admitted, streamed, victims, leaving = verdict
        self._drop(victims)
        if leaving or streamed:
            self._fetch_crowded(blocks, verdict)
        else:
            copies = self._admit(admitted)
            if self._cache.in_flight:
                copies |= self._cache.in_flight
            self.gpu(blocks, copies)
        if self._tells:
            for block in sorted(admitted):
                self._evict.admit(block)

    def _fetch_crowded(self, blocks: list[int], verdict: Verdict) -> None:
        """The same where not all of the layer's experts can be kept: what is there, then what arrives, as it arrives.

        Some are streamed through the staging slots, and residents may leave once they have been read.
        """
        admitted, streamed, _, leaving = verdict
        ready = [block for block in blocks if self._cache.slot_of[block] >= 0]
        self._drop([block for block in leaving if block not in ready])  # the CPU computes them from the host's copy
        leaving = [block for block in leaving if block in ready]
        at_once = len(admitted) - len(leaving)
        copies = self._admit(admitted[:at_once])
        for block, slot in zip(streamed, self._cache.staging, strict=False):
            copies[block] = self._copy(block, slot)
        self.gpu(ready, self._cache.in_flight)
        if leaving:
            copies |= self._swap(leaving, admitted[at_once:])
        self.gpu(admitted, copies)
        self._stream(streamed, copies)

    def prefetch(self, layer: int, block: int, victim: int) -> tuple[Operation, ...]:
        """The copy of ``block``, after the eviction of ``victim`` unless that is -1."""
        self.begin(layer, {})
        self._drop(() if victim < 0 else (victim,))
        number = self._copy(block, self._cache.insert(block))
        self._cache.in_flight[block] = number
        self._evict.admit(block)
        *evictions, copy = self.operations
        return (*evictions, copy._replace(prefetch=True))

    def _swap(self, leaving: Sequence[int], arriving: Sequence[int]) -> dict[int, int]:
        """Residents that leave once they have been read: each gives its slot to one of ``arriving``."""
        reads = {self._base + one.expert: one.id for one in self.operations if one.op == GPU}
        copies = {}
        for leaver, block in zip(leaving, arriving, strict=True):
            self._drop((leaver,))
            copies[block] = self._copy(block, self._cache.insert(block), (reads[leaver],))
        return copies

    def _stream(self, streamed: Sequence[int], copies: dict[int, int]) -> None:
        """Experts that are not kept pass through the staging slots, each copy after the read of its predecessor."""
        staging = self._cache.staging
        for index, block in enumerate(streamed):
            slot = staging[index % len(staging)]
            self._number = number = self._number + 1
            fields = (number, GPU, self._layer, block - self._base, slot, self._load[block], 0, (copies[block],), False)
            self.operations.append(operation_of(fields))
            self._evict.forget(block)
            if index + len(staging) < len(streamed):
                follower = streamed[index + len(staging)]
                copies[follower] = self._copy(follower, slot, (number,))

    def _admit(self, blocks: Iterable[int]) -> dict[int, int]:
        """Gives ``blocks`` free slots, and returns the operations that copy them there."""
        insert, copy, copies = self._cache.insert, self._copy, {}
        for block in blocks:
            copies[block] = copy(block, insert(block))
        return copies

    def _copy(self, block: int, slot: int, after: tuple[int, ...] = ()) -> int:
        self._number = number = self._number + 1
        if slot in self._saved_by:
            after = (*after, self._saved_by.pop(slot))
        fields = (number, COPY, self._layer, block - self._base, slot, 0, self._bytes, after, False)
        self.operations.append(operation_of(fields))
        return number

    def _drop(self, blocks: Sequence[int]) -> None:
        """Removes ``blocks``, which may be other layers', from the cache; what is written back keeps its slot busy."""
        remove, forget, experts, size_bytes = self._cache.remove, self._evict.forget, self._experts, self._written_bytes
        add = self.operations.append
        for number, block in enumerate(blocks, self._number + 1):
            layer, expert = divmod(block, experts)
            slot = remove(block)
            add(operation_of((number, EVICT, layer, expert, slot, 0, size_bytes, (), False)))
            if size_bytes:
                self._saved_by[slot] = number
            forget(block)
        self._number += len(blocks)
