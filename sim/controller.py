"""One layer of decisions: the code that the simulated and the real clock both run.

The clock calls, from one thread: :meth:`~OffloadController.begin_step`, then for each MoE layer
:meth:`~OffloadController.plan_layer`, and, while its link has room, :meth:`~OffloadController.next_transfer`. It
reports arrivals of prefetched experts with :meth:`~OffloadController.on_arrival`. Once a layer's choice is known, it
takes back those that have not begun and of which :meth:`~OffloadController.is_stale` says so, and reports them with
:meth:`~OffloadController.on_withdrawal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sim.cache import ExpertCache
from sim.draft import Draft
from sim.host_memory import HostMemory
from sim.plan import LayerPlan, Operation
from sim.policies import LayerView, PolicyContext
from sim.policies.base import Assignment, Calibration, Future, Policy, PrefetchView
from sim.policies.place.split import makespan_s, place_timed, schedule_s, split
from sim.systems import Budget, SystemSpec
from traces.workload import Routing

NOTHING: list[int] = []
"""The experts of a device that has none of them."""


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
            by_layer=budget.by_layer,
        )
        self.system, self.shape, self.budget = system, shape, budget
        self.cache = ExpertCache(
            shape.layers, shape.experts, budget.by_layer or budget.slots, shared=shared, staging=budget.staging
        )
        self._context = context
        self._evict = system.eviction(context)
        self._place = system.placement(context)
        self._prefetch = system.prefetching(context)
        told: list[Policy] = [self._evict, self._prefetch]
        self._hear_sequences = [one for one in told if _hears(one, "begin_sequence")]
        self._hear_scores = [one for one in told if "scores" in one.needs]
        self._hear_uses = [one for one in told if _hears(one, "observe")]
        self._defers, self._protected_ranks = system.deferral > 0, shape.top_k - system.deferral
        self._looks_ahead = system.prefetch != "none" and not system.synchronous
        self._weighs_time = self._looks_ahead and self._prefetch.weighs_time
        self._predicted = predicted
        held = budget.host_slots
        memory = HostMemory(held) if held is not None and held < context.blocks else None
        self.reads_disk = memory is not None
        """Whether some experts are on a disk, for the host's memory does not hold them all."""
        self.layers_on_cpu: frozenset[int] = frozenset()
        """Layers that run on the CPU as a whole, dense part included; known after :meth:`preload`."""
        self._draft = Draft(self.cache, self._evict, shape.expert_bytes, write_back=system.write_back, memory=memory)
        self._layer_s = lru_cache(maxsize=8192)(self._scheduled_s)
        self.preloaded = self.prefetched = 0
        """Blocks that were loaded before the first step, and copied before they were asked for."""
        self.fallbacks = 0
        """Layers in which one device alone was quicker than the placement's own schedule."""
        self._event = -1
        self._wanted: list[int] = []
        self._protected: set[int] = set()

    def preload(self) -> list[Operation]:
        """What is loaded before the first step: copies, which nothing waits for."""
        blocks = self._first_blocks() if self.system.starts_with else self._evict.preload()
        if self.system.dense_follows:
            blocks = self._whole_layers(blocks)
        self.preloaded = len(blocks)
        return self._draft.preload(blocks)

    def _whole_layers(self, blocks: Sequence[int]) -> list[int]:
        """Those of ``blocks`` that make up whole layers; the other layers run on the CPU, and keep nothing."""
        experts = self.shape.experts
        held = Counter(block // experts for block in blocks)
        self.layers_on_cpu = frozenset(layer for layer in range(self.shape.layers) if held[layer] < experts)
        for block in blocks:
            if block // experts in self.layers_on_cpu:
                self._evict.forget(block)
        return [block for block in blocks if block // experts not in self.layers_on_cpu]

    def _first_blocks(self) -> Sequence[int]:
        """The set that fills the cache before a policy that did not choose it takes over."""
        policy = self.system.first_set(self._context)
        chosen = policy.preload() if policy else ()
        for block in chosen:
            self._evict.admit(block)
        return chosen

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
        if layer in self.layers_on_cpu:
            on_cpu, on_gpu, fetched = [*load], NOTHING, NOTHING
        elif self._place.uses_cpu and (missing or self._place.takes_hits):
            assigned = self._assign(layer, load, parts)
            cpu, gpu, copies, _ = assigned[0]
            base = layer * self.shape.experts
            on_cpu, on_gpu = [base + expert for expert in cpu], [base + expert for expert in gpu]
            fetched = [base + expert for expert in copies]
        else:
            on_cpu, on_gpu, fetched = NOTHING, [*hits, *late, *missing], missing
        verdict = self.cache.settle(layer, load, fetched, self._evict) if fetched else None
        draft = self._draft
        draft.begin(layer, load)
        if on_cpu:
            deferred = self._deferred(layer, routing, on_cpu) if self._defers else NOTHING
            if deferred:
                on_cpu = [*[block for block in on_cpu if block not in deferred], *deferred]
            draft.cpu(on_cpu, len(deferred))
        if verdict:
            draft.fetch(on_gpu, verdict)
        else:
            draft.gpu(on_gpu, self.cache.in_flight)
        if self._looks_ahead:
            times_s = self._times(layer, load, parts, assigned) if self._weighs_time else (0.0, 0.0)
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
            self.prefetched += 1
            return self._draft.prefetch(layer, block, victim)
        return ()

    def on_arrival(self, operation: Operation) -> None:
        """A prefetched expert is on the device."""
        del self.cache.in_flight[operation.layer * self.shape.experts + operation.expert]
        self._draft.arrived(operation)

    def is_stale(self, operation: Operation, layer: int, routing: Routing) -> bool:
        """Whether a prefetch that has not begun is to be decided anew, now that ``layer``'s choice is known: all but
        those that this layer fetches in any case, as its router chose them and nothing else may compute them."""
        return self._place.uses_cpu or operation.layer != layer or operation.expert not in routing.experts

    def on_withdrawal(self, operation: Operation) -> None:
        """A stale prefetch has been taken back: its expert, where it is wanted at all, is decided anew.

        Its slot is free; the expert that had made room for it stays out.
        """
        del self.cache.in_flight[operation.layer * self.shape.experts + operation.expert]
        self._draft.withdraw(operation)
        self.prefetched -= 1

    def _take_in(self, layer: int, routing: Routing) -> dict[int, int]:
        """Tells the policy of the event; returns block -> tokens, most tokens first, then the lowest id."""
        self._event += 1
        base = layer * self.shape.experts
        experts, counts, assignments, scores, _ = routing
        blocks = [base + expert for expert in experts]
        if not blocks:  # nothing was routed: no event for a policy, as in a replay
            return {}
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
    ) -> tuple[Assignment, LayerView, float]:
        """Asks the placement policy who computes what, and how long that takes where it is to be weighed; ``parts`` are
        the blocks that hit, are late, and miss."""
        view, seconds = self._view(layer, load, parts), 0.0
        if self._weighs_time:
            assignment, seconds = place_timed(self._place, view)
        else:
            assignment = self._place.place(view)
        self.fallbacks += assignment.fallback
        return assignment, view, seconds

    def _deferred(self, layer: int, routing: Routing, on_cpu: list[int]) -> list[int]:
        """Those of ``on_cpu`` that may join the next layer's output: no token of theirs has them among its best."""
        if layer == self.shape.layers - 1:
            return NOTHING
        assert routing.ranks is not None, "whoever wants deferral is given ranks"
        rank_of, base = dict(zip(routing.experts, routing.ranks, strict=True)), layer * self.shape.experts
        return [block for block in on_cpu if rank_of[block - base] >= self._protected_ranks]

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
        copy_s = self._predicted.copy_s
        if not late:
            return (), copy_s
        begun = next(iter(self.cache.in_flight))
        queue = [block for block in self.cache.in_flight if block == begun or block in late]
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
        self._protected = {*load, *wanted}
        for base, named in enumerate(ahead, layer + 1):
            self._protected.update([base * experts + expert for expert, _ in named])

    def _times(
        self,
        layer: int,
        load: Mapping[int, int],
        parts: tuple[list[int], list[int], list[int]],
        assigned: tuple[Assignment, LayerView, float] | None,
    ) -> tuple[float, float]:
        """Predicted seconds until the link has brought this layer's copies, and until the next router has chosen."""
        if assigned is None:
            view = self._view(layer, load, parts)
            alone = split(view, ())
            assigned = alone, view, makespan_s(view, alone)
        assignment, view, seconds = assigned
        link_free_s = view.link_free_s + len(assignment.copies) * view.copy_s
        return link_free_s, seconds + self._predicted.router_s

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
        return schedule_s(self._place, view)

    def _victim(self, layer: int) -> int | None:
        """The block that a prefetch for ``layer`` may push out: -1 where a slot is free, None where all that is there
        is needed sooner."""
        cache = self.cache
        if cache.free_slots(layer):
            return -1
        needed = self._protected | cache.in_flight.keys()
        spare = [block for block in cache.residents(layer) if block not in needed]
        return cache.weakest(spare, self._evict)[0] if spare else None


def _hears(policy: Policy, hook: str) -> bool:
    """Whether a policy listens: most leave most hooks as they are, and are not called."""
    return getattr(type(policy), hook) is not getattr(Policy, hook)


_plan_of: Callable[[tuple[Any, ...]], LayerPlan] = partial(tuple.__new__, LayerPlan)
