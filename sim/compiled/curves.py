"""One pass over a stream that gives the hits of every capacity: the distance at which each use finds its block.

A stack keeps the blocks of a pool so that a cache holds those from its top down to its capacity (Mattson, Gecsei,
Slutz and Traiger, *Evaluation techniques for storage hierarchies*, IBM Systems Journal 9(2), 1970). The *distance* of a
block is what a cache needs to reach down to it, the block included: its use hits in every cache that has as much.

Shapes: B blocks, P pools, W blocks a pool, N a power of two from 2 W on, U uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from sim.compiled import jit, jit_allocating
from sim.compiled.stream import Stream, arrange, gather
from sim.compiled.twin import Array

NEVER = np.iinfo(np.int32).max
"""Key of a block that is not used again. It is worth nothing, so that its place in a stack is as good as free."""


class RecentFirst(NamedTuple):
    """The stack of ``lru``: every use takes the next place of its pool, and the last place taken is the top.

    ``sums`` is the tree of P. M. Fenwick, *A new data structure for cumulative frequency tables* (Software: Practice
    and Experience 24(3), 1994) over the weights of the blocks by place: a distance costs log N additions.
    """

    sums: Array  # int64 [P, N + 1]
    taken: Array  # int32 [P, N], the block that took a place; it holds it until it takes another
    place: Array  # int32 [B], -1 for none
    top: Array  # int64 [P], the next place
    weights: Array  # int64 [B]


class NeededFirst(NamedTuple):
    """The stack of ``belady`` for blocks of one weight: it holds keys, which tell blocks apart, and not the blocks."""

    keys: Array  # int32 [P, W], NEVER where a place is free
    key: Array  # int32 [B], -1 before the first use
    upcoming: Array  # int32 [U], the key that each use gives its block
    weights: Array  # int64 [B]


class NeededFirstBytes(NamedTuple):
    """The same for blocks of several weights, which go through the stack with the keys; it is then a heuristic."""

    keys: Array  # int32 [P, W]
    key: Array  # int32 [B]
    upcoming: Array  # int32 [U]
    weights: Array  # int64 [B]
    sizes: Array  # int64 [P, W], weights of the blocks in ``keys``


class Tally(NamedTuple):
    """How many uses have which distance. Bin 0 is for first uses, then each capacity has the uses that only reach it.

    Row 0 is for prefill, 1 for decode, 2 for warming up.
    """

    union: Array  # int64 [3, bins]
    assignments: Array  # int64 [3, bins]
    capacities: Array  # int64 [bins - 2], rising; empty: those of 1, 2, ... bins - 1


class Desk(NamedTuple):
    """Room for the event at hand."""

    union: Array  # int64 [E]
    counts: Array  # int64 [E]
    clock: Array  # int64 [1], uses so far


class Manner(NamedTuple):
    """How a stream is measured. Under the atomic contract the order is the ascending one."""

    shared: bool  # one pool for all layers
    serial: bool
    order: int
    seed: int


def measure(stack: Any, pool: int, block: int, use: int) -> int:
    """The distance of ``block``, 0 when it was not used before; ``use`` is its number."""
    raise NotImplementedError


def move(stack: Any, pool: int, block: int) -> None:
    """Puts ``block``, which was measured, where its use lifts it."""
    raise NotImplementedError


def _measure_recent(stack: Any, pool: int, block: int, use: int) -> int:
    place, sums = stack.place[block], stack.sums[pool]
    if place < 0:
        return 0
    distance: int = sums[sums.size - 1]
    while place > 0:
        distance -= sums[place]
        place &= place - 1
    return distance


def _move_recent(stack: Any, pool: int, block: int) -> None:
    sums, weight, top = stack.sums[pool], stack.weights[block], stack.top[pool]
    if stack.place[block] >= 0:
        node = stack.place[block] + 1
        while node < sums.size:
            sums[node] -= weight
            node += node & -node
    stack.place[block] = top
    stack.taken[pool, top] = block
    node = top + 1
    while node < sums.size:
        sums[node] += weight
        node += node & -node
    stack.top[pool] = top + 1
    if top + 2 == sums.size:
        _close_ranks(stack, pool)


@jit
def _close_ranks(stack: RecentFirst, pool: int) -> None:
    """Gives the blocks of a pool its first places, in their order."""
    sums, taken, top = stack.sums[pool], stack.taken[pool], 0
    for place in range(taken.size):
        block = taken[place]
        if stack.place[block] == place:
            taken[top] = block
            stack.place[block] = top
            sums[top + 1] = stack.weights[block]
            top += 1
    stack.top[pool] = top
    sums[top + 1 :] = 0
    for node in range(1, sums.size):
        above = node + (node & -node)
        if above < sums.size:
            sums[above] += sums[node]


@jit
def _find(keys: Array, wanted: int) -> int:
    """The first place of a key that is there; looks at 32 at once, which the processor compares side by side."""
    first, found = 0, False
    while not found:
        for place in range(first, first + 32):
            found |= keys[place] == wanted
        first += 32
    place = first - 32
    while keys[place] != wanted:
        place += 1
    return place


def _measure_needed(stack: Any, pool: int, block: int, use: int) -> int:
    keys, old, new = stack.keys[pool], stack.key[block], stack.upcoming[use]
    place = _find(keys, old if old >= 0 else NEVER)
    keys[place] = stack.key[block] = new
    distance: int = (place + 1) * stack.weights[block]
    return distance if old >= 0 else 0


def _move_needed(stack: Any, pool: int, block: int) -> None:
    keys, carried = stack.keys[pool], stack.key[block]
    if carried == NEVER:
        return
    own = _find(keys, carried)
    for place in range(own):
        other = keys[place]
        keys[place] = min(other, carried)
        carried = max(other, carried)
    keys[own] = carried


def _measure_needed_bytes(stack: Any, pool: int, block: int, use: int) -> int:
    keys, sizes, old = stack.keys[pool], stack.sizes[pool], stack.key[block]
    stack.key[block] = stack.upcoming[use]
    wanted, place, distance = old if old >= 0 else NEVER, 0, stack.weights[block]
    while keys[place] != wanted:
        distance += sizes[place]
        place += 1
    keys[place], sizes[place] = stack.upcoming[use], stack.weights[block]
    return distance if old >= 0 else 0


def _move_needed_bytes(stack: Any, pool: int, block: int) -> None:
    keys, sizes, own = stack.keys[pool], stack.sizes[pool], stack.key[block]
    if own == NEVER:
        return
    carried, weight, place = own, stack.weights[block], 0
    while keys[place] != own:
        if keys[place] > carried:
            keys[place], carried = carried, keys[place]
            sizes[place], weight = weight, sizes[place]
        place += 1
    keys[place], sizes[place] = carried, weight


_OPERATIONS: dict[type[Any], tuple[Callable[..., int], Callable[..., None]]] = {
    RecentFirst: (_measure_recent, _move_recent),
    NeededFirst: (_measure_needed, _move_needed),
    NeededFirstBytes: (_measure_needed_bytes, _move_needed_bytes),
}


def _resolve(operation: Callable[..., Any], which: int) -> None:
    """Lets numba compile a call of ``operation`` into the one of the stack that it is given."""

    def implementation(stack: Any, *_: Any) -> Callable[..., Any]:
        return _OPERATIONS[stack.instance_class][which]

    overload(operation, strict=False, jit_options={"_nrt": False})(implementation)


_resolve(measure, 0)
_resolve(move, 1)


@jit
def _bin(capacities: Array, distance: int) -> int:
    if capacities.size == 0 or distance == 0:
        return distance
    low, high = 0, capacities.size
    while low < high:
        middle = (low + high) // 2
        if capacities[middle] < distance:
            low = middle + 1
        else:
            high = middle
    return low + 1


@jit
def measure_runs(stack: Any, stream: Stream, desk: Desk, tally: Tally, manner: Manner, begin: int, end: int) -> None:
    """Measures the uses of the runs from ``begin`` to ``end``; ``stream.bins`` are rows of the tally."""
    layers, experts, use = stream.ids.shape[1], desk.counts.size, desk.clock[0]
    for run in range(begin, end):
        union, assignments = tally.union[stream.bins[run]], tally.assignments[stream.bins[run]]
        for step in range(stream.runs[run], stream.runs[run + 1]):
            for layer in range(layers):
                found, base = gather(stream, desk.union, desk.counts, step, layer), layer * experts
                arrange(desk.union, desk.counts, found, base, manner.order, manner.seed, step * layers + layer)
                pool = 0 if manner.shared else layer
                width = 1 if manner.serial else found
                for first in range(0, found, max(width, 1)):
                    for index in range(first, first + width):
                        block = desk.union[index]
                        where = _bin(tally.capacities, measure(stack, pool, block, use + index))
                        union[where] += 1
                        assignments[where] += desk.counts[block - base]
                        desk.counts[block - base] = 0
                    for index in range(first, first + width):
                        move(stack, pool, desk.union[index])
                use += found
    desk.clock[0] = use


@jit_allocating
def upcoming_keys(stream: Stream, blocks: int, manner: Manner) -> Array:
    """The key that each use gives its block, as its worth until the next one: int32 [U], smallest is kept longest.

    Keys are in the order of the next use. Those of blocks that are used next in the same event are, under the atomic
    contract, in the order in which the policy keeps them: most recently used first.
    """
    layers, experts = stream.ids.shape[1], blocks // stream.ids.shape[1]
    out = np.full(stream.ids.size, NEVER, np.int32)
    last = np.full(blocks, -1, np.int64)
    union, ranked, counts = np.empty(experts, np.int64), np.empty(experts, np.int64), np.zeros(experts, np.int64)
    uses = 0
    for step in range(stream.runs[-1]):
        for layer in range(layers):
            found = gather(stream, union, counts, step, layer)
            arrange(union, counts, found, layer * experts, manner.order, manner.seed, step * layers + layer)
            ranked[:found] = union[:found]
            if not manner.serial:
                _sort_by_last(ranked, last, found)
            for index in range(found):
                if last[ranked[index]] >= 0:
                    out[last[ranked[index]]] = uses + index
            for index in range(found):
                last[union[index]] = uses + index
                counts[union[index] - layer * experts] = 0
            uses += found
    return out[:uses]


@jit
def _sort_by_last(ranked: Array, last: Array, found: int) -> None:
    for index in range(1, found):
        block, place = ranked[index], index
        while place > 0 and last[ranked[place - 1]] < last[block]:
            ranked[place] = ranked[place - 1]
            place -= 1
        ranked[place] = block


def recent_first(weights: Array, pools: int) -> RecentFirst:
    """An empty stack of ``lru``."""
    places = 2 << (len(weights) // pools - 1).bit_length()
    return RecentFirst(
        sums=np.zeros((pools, places + 1), np.int64),
        taken=np.zeros((pools, places), np.int32),
        place=np.full(len(weights), -1, np.int32),
        top=np.zeros(pools, np.int64),
        weights=weights,
    )


def needed_first(weights: Array, pools: int, upcoming: Array) -> NeededFirst | NeededFirstBytes:
    """An empty stack of ``belady``, for pools whose blocks have one weight, or several."""
    keys = np.full((pools, -(-len(weights) // pools // 32) * 32), NEVER, np.int32)
    key = np.full(len(weights), -1, np.int32)
    if (weights.reshape(pools, -1) == weights.reshape(pools, -1)[:, :1]).all():
        return NeededFirst(keys, key, upcoming, weights)
    return NeededFirstBytes(keys, key, upcoming, weights, np.zeros(keys.shape, np.int64))
