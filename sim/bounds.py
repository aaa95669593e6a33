"""Bounds in seconds: what no system under the same budget and costs can undercut, told from the routing alone.

A run is cut into *stretches*, the longest sequences of passes of one phase; it is also one stretch as a whole. A
stretch of passes S takes at least

    T(S) = min over c of max(D(c), R(c))

where c counts the expert uses (an expert asked for by a layer in a pass) that the CPU computes.

**D(c), the chain.** Each pass does, one after the other: the dispatch of its first layer; for each layer its dense
part, the read-back, the decision, the submission of one operation a use, and its experts; the head. Experts begin when
they are submitted, and the dense part after them waits for all of them, on the GPU and on the CPU; only the next
dispatch runs beside. So a layer with the tokens t_1..t_n takes, with c of them on the CPU, at least W(c) =
max(dispatch, GPU seconds of the others, CPU seconds of the c), with the extra of the CPU's first expert. For any choice
of the c, the longer of both device times is at least their mean with weights w and 1 - w, and that is least for the c
uses with the lowest (1 - w) cpu(t) - w gpu(t): W(c) is taken as the greatest such value over a few w, which is exact
where all t are equal. D(c) is the least sum over all layers with c uses on the CPU in all: of each W its convex
minorant is taken, so that the cheapest steps of all layers, in order of price, give D for every c at once.

**R(c), the link.** A use is *free* when the GPU computes it and its expert has sat in (or been on its way to) one slot
since the use before, or since the stretch began. Free uses are intervals between uses, of which at most C, the slots of
all layers together, overlap: staging slots keep nothing between layers. The most intervals that fit are those that
Belady's rule with bypass keeps (Belady 1966; as k-colourable subgraph of an interval graph: Carlisle and Lloyd 1995),
here with a start that is chosen freely: preloading takes no time, and before a stretch of one phase anything may have
been prefetched. Of the m uses that are not free, each is computed on the CPU or has a copy of its own, made within the
stretch. The link copies one at a time, and after the last copy there come at least its expert and the head: R(c) =
(m - c) copy + expert + head while c < m, else 0. This holds for every scope and every split of the slots over layers.

A phase takes at least the sum over its stretches, and the run at least the longer of its own T and the sum of the
phases. Left out, which only adds time: look-ahead, what policies take to decide on a profile, further operations,
contention, write-back, the disk, what chunks cost beyond the copy itself.

The chain holds for systems whose dense work is on the GPU. Where it follows the experts to the CPU (``dense_follows``),
a layer whose experts are all on the CPU may have its dense part there, too, needs no read-back, and hands nothing over:
W(n) is then the lesser of both. Where CPU experts may be deferred to the next layer (``defers``), a layer may end
before them: W(c) is then without the CPU's seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sim.costs import Costs
from sim.profile import ProfileCosts
from sim.results import RunResult
from traces.batching import Requests, known_order
from traces.schema import Array, Phase
from traces.workload import Workload

if TYPE_CHECKING:
    from sim.scenario import Prepared

ROUNDING = 1e-9
"""A run that is off its bound by this share of it is at it."""
WEIGHTS = np.linspace(0.0, 1.0, 17)
"""Weights of the GPU's time in the means that bound a layer's."""

Sizes: TypeAlias = tuple[int, int, int]
"""Tokens of a pass, those of its longest context, and its sequences."""
Tokens: TypeAlias = tuple[int, ...]
"""Tokens of each expert of a layer, fewest first."""


@dataclass(frozen=True)
class Bound:
    """What some passes take at least. ``chain_s`` is what they would if nothing ever had to be copied."""

    seconds: float = 0.0
    chain_s: float = 0.0
    misses: int = 0  # uses that are copied or computed on the CPU
    on_cpu: int = 0  # uses that the CPU computes where the bound is reached

    def __add__(self, other: Bound) -> Bound:
        return Bound(
            self.seconds + other.seconds,
            self.chain_s + other.chain_s,
            self.misses + other.misses,
            self.on_cpu + other.on_cpu,
        )

    @property
    def binding(self) -> str:
        """What sets the bound: the link, or the chain of host, GPU and CPU."""
        return "link" if self.seconds > self.chain_s else "chain"


@dataclass(frozen=True)
class Bounds:
    """Bounds of a run, and of the passes of each phase, with ``slots`` for experts in all."""

    slots: int
    run: Bound
    prefill: Bound
    decode: Bound
    dense_follows: bool = False

    @property
    def told_s(self) -> dict[str, float]:
        """The seconds alone, as a result keeps them: of the run, and of the passes of each phase."""
        return {name: getattr(self, name).seconds for name in ("run", "prefill", "decode")}


def lower_bound(prepared: Prepared, demand: Demand | None = None) -> Bounds:
    """The bounds of a scenario with all slots that its limit gives, whatever its system makes of them.

    Whoever holds every expert, whatever the limit, has the bounds of that, and who takes dense work to the CPU, or
    defers experts, those of systems that may. ``demand`` is that of its plan and slots, if known. Raises as
    :func:`demand_of`.
    """
    system = prepared.system
    return bounds_of(
        prepared.plan,
        _costs_of(prepared),
        prepared.slots,
        dense_follows=system.dense_follows,
        defers=system.deferral > 0,
        demand=demand,
    )


def lower_bounds(compared: Sequence[Prepared]) -> list[Bounds]:
    """The bounds of scenarios that differ in nothing but the system: what there is to do is worked out once."""
    demands = {slots: demand_of(compared[0].plan, slots) for slots in {one.slots for one in compared}}
    return [lower_bound(one, demands[one.slots]) for one in compared]


def _costs_of(prepared: Prepared) -> Costs:
    """The costs of the scenario's run, which on a profile depend on its slots, but for what its policies take to
    decide: others may decide in no time."""
    costs = prepared.costs
    if not isinstance(costs, ProfileCosts):
        return costs
    held = prepared.budget.total(prepared.model.moe_layers, prepared.system.scope) + prepared.budget.staging
    return ProfileCosts(costs.profile.model_copy(update={"planning": ()})).for_run(prepared.system, held)


def regret_of(run: RunResult, bounds: Bounds | None) -> dict[str, float | None]:
    """What a run took beyond its ``bounds``, as in ``docs/metrics.md``; None where nothing was observed, or is bound.

    ``bound_token_s`` and ``regret_token_s`` are seconds a decode token, ``regret`` and ``prefill_regret`` shares of the
    bound.
    """
    names = ("bound_token_s", "regret_token_s", "regret", "prefill_regret")
    if bounds is None:
        return dict.fromkeys(names)
    rows = run.tokens
    steps = rows.drop_duplicates("step")
    took_s = (steps.end_s - steps.start_s).groupby(steps.phase).sum()
    decode_s, prefill_s = (float(took_s.get(int(phase), 0.0)) for phase in (Phase.DECODE, Phase.PREFILL))
    tokens = int(rows.tokens[rows.phase == Phase.DECODE].sum())
    bound_s = bounds.decode.seconds
    beyond_s, prefill_beyond_s = _beyond(decode_s, bound_s), _beyond(prefill_s, bounds.prefill.seconds)
    found = (
        _ratio(bound_s, tokens),
        _ratio(beyond_s, tokens),
        _ratio(beyond_s, bound_s),
        _ratio(prefill_beyond_s, bounds.prefill.seconds),
    )
    return dict(zip(names, found, strict=True))


def _beyond(took_s: float, bound_s: float) -> float:
    """What sums of many passes differ in by rounding is nothing."""
    beyond_s = took_s - bound_s
    return 0.0 if abs(beyond_s) < ROUNDING * bound_s else beyond_s


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def bounds_of(
    plan: Workload | Requests,
    costs: Costs,
    slots: int,
    *,
    dense_follows: bool = False,
    defers: bool = False,
    demand: Demand | None = None,
) -> Bounds:
    """Bounds for every system that runs ``plan`` with ``slots`` for experts in all, staging slots apart.

    With ``dense_follows`` they hold for systems, too, that run layers on the CPU as a whole, with ``defers`` for those
    whose CPU experts may join the next layer's output. ``demand`` is that of the plan and the slots, if known. Raises
    as :func:`demand_of`.
    """
    demand = demand or demand_of(plan, slots)
    prices = _Prices(costs, min(plan.trace.header.expert_bytes), dense_follows, defers)
    by_phase = {Phase.PREFILL: Bound(), Phase.DECODE: Bound()}
    for phase, stretch in demand.stretches:
        by_phase[phase] += prices.bound(stretch)
    prefill, decode = by_phase[Phase.PREFILL], by_phase[Phase.DECODE]
    run = max(prices.bound(demand.whole), prefill + decode, key=lambda one: one.seconds)
    return Bounds(slots, run, prefill, decode, dense_follows)


@dataclass(frozen=True)
class Stretch:
    """What passes that follow one another without a gap have to do, whatever that takes."""

    passes: Counter[Sizes]  # how many there are of the same sizes
    layers: Counter[tuple[Sizes, Tokens]]  # how many layers with the same tokens in passes of the same sizes
    misses: int  # uses that are not free, as in the module's text


@dataclass(frozen=True)
class Demand:
    """The stretches of a plan with some slots, in order, and all of it as one: what its bounds are told from under any
    costs. It depends on the routing alone, and not on what experts weigh."""

    stretches: Sequence[tuple[Phase, Stretch]]
    whole: Stretch


def demand_of(plan: Workload | Requests, slots: int) -> Demand:
    """What ``plan`` has to do with ``slots`` for experts in all; raises :class:`InputError` for requests that arrive
    over time: the order of their passes depends on the system."""
    from sim.run import routings_of  # simpy is imported with it

    workload = known_order(plan, "a bound")
    routing, experts = routings_of(workload.trace), workload.trace.header.experts
    stretches: list[tuple[Phase, Stretch]] = []
    all_uses: list[list[int]] = []
    for phase, steps in groupby(workload, key=lambda step: step.phase):
        passes, layers, uses = Counter[Sizes](), Counter[tuple[Sizes, Tokens]](), list[list[int]]()
        for step in steps:
            sizes = len(step.rows), step.context, len(step.sequences)
            routings = routing(step)
            passes[sizes] += 1
            layers.update((sizes, tuple(sorted(one.counts))) for one in routings)
            uses += ([place * experts + block for block in one.experts] for place, one in enumerate(routings))
        stretches.append((phase, Stretch(passes, layers, fewest_misses(uses, slots))))
        all_uses += uses
    passes, layers = Counter[Sizes](), Counter[tuple[Sizes, Tokens]]()
    for _, stretch in stretches:
        passes.update(stretch.passes)
        layers.update(stretch.layers)
    return Demand(stretches, Stretch(passes, layers, fewest_misses(all_uses, slots)))


class _Prices:
    """Bounds of stretches under some costs."""

    def __init__(self, costs: Costs, size_bytes: int, dense_follows: bool, defers: bool) -> None:
        self._costs, self._host = costs, costs.host
        self._dense_follows = dense_follows
        self._cpu_expert_s = (lambda tokens, first: 0.0) if defers else costs.cpu_expert_s
        self._copy_s = costs.copy_s(size_bytes)
        self._layer, self._dense = cache(self._minorant), cache(self._dense_s)

    def bound(self, stretch: Stretch) -> Bound:
        """The bound of a stretch."""
        chain_s = self._chain(stretch)
        loads = stretch.misses - np.arange(len(chain_s))  # uses that are copied, by uses on the CPU
        link_s = np.where(loads > 0, loads * self._copy_s + self._rest_s(stretch), 0.0)
        seconds = np.maximum(chain_s, link_s)
        on_cpu = int(seconds.argmin())
        return Bound(float(seconds[on_cpu]), float(chain_s.min()), stretch.misses, on_cpu)

    def _chain(self, stretch: Stretch) -> Array:
        """D of the module's text, for every number of uses on the CPU from 0 to all: float64 [uses + 1]."""
        fixed_s = sum(many * (self._host.layer_s + self._head_s(sizes)) for sizes, many in stretch.passes.items())
        kinds: Counter[tuple[Tokens, float]] = Counter()
        for (sizes, tokens), many in stretch.layers.items():
            base_s, moved_s = self._dense(sizes)
            fixed_s += many * base_s
            kinds[tokens, moved_s] += many
        steps_s, often = [np.empty(0)], [np.empty(0, np.int64)]
        for (tokens, moved_s), many in kinds.items():
            least_s, more_s = self._layer(tokens, moved_s)
            fixed_s += many * (least_s + self._host.operation_s * len(tokens))
            steps_s.append(more_s)
            often.append(np.full(len(more_s), many))
        prices_s, count = np.concatenate(steps_s), np.concatenate(often)
        order = np.argsort(prices_s, kind="stable")
        return fixed_s + np.concatenate([[0.0], np.cumsum(np.repeat(prices_s[order], count[order]))])

    def _dense_s(self, sizes: Sizes) -> tuple[float, float]:
        """Seconds of a layer outside its experts, and what comes on top of them if its dense part is on the CPU."""
        host = self._host
        join_s = host.join_s + host.layer_s if host.joins_layers else 0.0
        dense_s = self._costs.dense_s(*sizes)
        moved_s = self._costs.cpu_dense_s(*sizes) - dense_s - host.readback_s if self._dense_follows else inf
        return dense_s + host.readback_s + host.controller_s + join_s, moved_s

    def _head_s(self, sizes: Sizes) -> float:
        tokens, context, sequences = sizes
        return self._costs.head_s(sequences, context, tokens)

    def _rest_s(self, stretch: Stretch) -> float:
        """What follows the last copy: its expert, and the head."""
        fewest = {tokens[0] for _, tokens in stretch.layers if tokens}
        expert_s = min(map(self._costs.gpu_expert_s, fewest), default=0.0)
        return expert_s + min(map(self._head_s, stretch.passes))

    def _minorant(self, tokens: Tokens, moved_s: float) -> tuple[float, Array]:
        """The convex minorant of a layer's seconds by its uses on the CPU: the first value, and the steps up to all."""
        beside_s = 0.0 if self._host.joins_layers else self._host.layer_s  # the next dispatch runs beside the experts
        layer_s = np.maximum(split_s(tokens, self._costs.gpu_expert_s, self._cpu_expert_s), beside_s)
        all_on_cpu_s = sum(self._costs.cpu_expert_s(count, False) for count in tokens)
        layer_s[-1] = min(layer_s[-1], max(all_on_cpu_s, beside_s) + moved_s)
        return float(layer_s[0]), np.diff(_convex(layer_s))


def split_s(
    tokens: Sequence[int], gpu_expert_s: Callable[[int], float], cpu_expert_s: Callable[[int, bool], float]
) -> Array:
    """What a layer's experts with these ``tokens`` take at least, with 0 to all n of them on the CPU: float64 [n + 1].

    All are where they are computed; GPU and CPU begin together. Exact where all tokens are equal.
    """
    gpu_s = np.array([gpu_expert_s(count) for count in tokens])
    cpu_s = np.array([cpu_expert_s(count, False) for count in tokens])
    first_s = min((cpu_expert_s(count, True) - cpu_expert_s(count, False) for count in tokens), default=0.0)
    gpu_share, cpu_share = WEIGHTS[:, None], 1.0 - WEIGHTS[:, None]
    moved_s = np.cumsum(np.sort(cpu_share * cpu_s - gpu_share * gpu_s, axis=1), axis=1) + cpu_share * first_s
    means_s = WEIGHTS[:, None] * gpu_s.sum() + np.concatenate([np.zeros((len(WEIGHTS), 1)), moved_s], axis=1)
    return np.asarray(means_s.max(axis=0))


def _convex(values: Array) -> Array:
    """The greatest convex sequence that is nowhere above ``values``."""
    corners = [0]
    for place in range(1, len(values)):
        while len(corners) > 1 and _above(values, corners[-2], corners[-1], place):
            corners.pop()
        corners.append(place)
    return np.interp(np.arange(len(values)), corners, values[corners])


def _above(values: Array, left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line between its neighbours."""
    slope = (values[right] - values[left]) / (right - left)
    return bool(values[middle] >= values[left] + slope * (middle - left))


def fewest_misses(events: Sequence[Sequence[int]], slots: int) -> int:
    """Uses that find their block in none of ``slots`` shared ones, at least: ``events`` are the blocks used together.

    What is there at the start is free to choose. A block may be used without being kept (Belady's rule with bypass),
    and is kept from one use to the next or not at all. O(n log n) in the uses.
    """
    next_use: list[list[int]] = []
    upcoming: dict[int, int] = {}  # by block: its first use from here on
    for event in reversed(range(len(events))):
        next_use.append([upcoming.get(block, -1) for block in events[event]])
        upcoming.update(dict.fromkeys(events[event], event))
    chosen = sorted(upcoming.items(), key=lambda use: use[1])[:slots]
    kept, latest = {block for block, _ in chosen}, [(-use, block) for block, use in chosen]
    heapify(latest)
    misses = 0
    for blocks, following in zip(events, reversed(next_use), strict=True):
        misses += len(blocks) - len(kept.intersection(blocks))
        kept.difference_update(blocks)
        for block, use in zip(blocks, following, strict=True):
            if use >= 0:
                kept.add(block)
                heappush(latest, (-use, block))
        while len(kept) > slots:
            kept.discard(heappop(latest)[1])
    return misses
