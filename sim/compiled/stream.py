"""The stream that is replayed, as arrays, and how the kernels read an event of it.

T rows, S passes, R runs, L layers, K experts a token, E experts a layer. *Event* s * L + l is layer l of pass s; a
*decision* is an event under the atomic contract, and one use of a block under the serial one, counted from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sim.compiled import jit, jit_allocating
from sim.compiled.twin import NOT_NEGATIVE, UNSEEN, Array, Cache
from sim.policies.evict import random
from traces.schema import NOT_ROUTED

AS_ROUTED, ASCENDING, SHUFFLED = range(3)


class Stream(NamedTuple):
    """The routing that is replayed."""

    ids: Array  # uint16 [T, L, K]
    rows: Array  # int64 [T], rows of ``ids`` in the order of the run; empty when they stand in it
    offsets: Array  # int64 [S + 1], bounds of the passes in ``rows``; empty when each has one row
    runs: Array  # int64 [R + 1], bounds of the runs: passes of one group and phase that follow each other
    bins: Array  # int64 [R], row of the table of counts: 2 * group + phase
    starts: Array  # uint8 [R], whether a new group begins with the run
    scores: Array  # uint16 [T, L, E], the bits of float16, or empty
    gates: Array  # uint16 [T, L, K], the bits of float16, or empty
    halves: Array  # float64 [65536], the number that each pattern of bits stands for
    weights: Array  # int64 [B], of a block, in the unit of the capacity
    bytes: Array  # int64 [B], of a block


_mixed = jit(random.mixed)


@jit
def mixed(seed: int, number: int, block: int) -> int:
    """:func:`sim.policies.evict.random.mixed`."""
    return np.int64(_mixed(np.uint64(seed), np.uint64(number), np.uint64(block)))  # type: ignore[return-value,arg-type]


@jit
def bounds(stream: Stream, step: int) -> tuple[int, int]:
    """The places in ``rows`` that belong to a pass."""
    if stream.offsets.size:
        return stream.offsets[step], stream.offsets[step + 1]
    return step, step + 1


@jit
def gather(stream: Stream, union: Array, counts: Array, step: int, layer: int) -> int:
    """Fills ``union`` and ``counts`` with one event's blocks, in order of appearance; returns how many there are."""
    ids, base = stream.ids, layer * counts.size
    found = 0
    first, last = bounds(stream, step)
    for index in range(first, last):
        row = stream.rows[index] if stream.rows.size else index
        for rank in range(ids.shape[2]):
            expert = ids[row, layer, rank]
            if expert != NOT_ROUTED:
                if counts[expert] == 0:
                    union[found] = base + expert
                    found += 1
                counts[expert] += 1
    return found


@jit
def arrange(union: Array, counts: Array, found: int, base: int, order: int, seed: int, event: int) -> None:
    """Puts the first ``found`` blocks of ``union`` into ``order``; the shuffled one depends on seed and event."""
    if found < 2 or order == AS_ROUTED:
        return
    _sort(union, counts, found, base)
    if order == SHUFFLED:
        for last in range(found - 1, 0, -1):
            other = mixed(seed, event, last) % (last + 1)
            union[last], union[other] = union[other], union[last]


@jit
def _sort(union: Array, counts: Array, found: int, base: int) -> None:
    if found > 24:
        found = 0
        for expert in range(counts.size):
            if counts[expert]:
                union[found] = base + expert
                found += 1
        return
    for index in range(1, found):
        block, place = union[index], index
        while place > 0 and union[place - 1] > block:
            union[place] = union[place - 1]
            place -= 1
        union[place] = block


@jit_allocating
def _next_uses_single(stream: Stream, blocks: int) -> Array:
    """The same for passes of one token with one expert a layer, from the last use to the first."""
    ids, (_, layers, _) = stream.ids, stream.ids.shape
    experts, passes, uses = blocks // layers, stream.runs[-1], 0
    for step in range(passes):
        for layer in range(layers):
            uses += ids[step, layer, 0] != NOT_ROUTED
    out, upcoming = np.empty(uses, np.int32), np.full(blocks, -1, np.int32)
    for back in range(passes):
        step = (passes - 1 - back) & NOT_NEGATIVE
        source = (stream.rows[step] if stream.rows.size else step) & NOT_NEGATIVE
        for layer in range(layers - 1, -1, -1):
            expert = ids[source, layer, 0]
            if expert != NOT_ROUTED:
                uses -= 1
                block = (layer * experts + expert) & NOT_NEGATIVE
                out[uses & NOT_NEGATIVE] = upcoming[block]
                upcoming[block] = uses
    return out


@jit_allocating
def next_uses(stream: Stream, blocks: int, serial: bool, order: int, seed: int) -> Array:
    """For every use, in the order of a replay, the decision of the block's next one, -1 for none: int32 [uses]."""
    layers, experts = stream.ids.shape[1], blocks // stream.ids.shape[1]
    if serial and stream.ids.shape[2] == 1 and not stream.offsets.size:
        return _next_uses_single(stream, blocks)
    out = np.full(stream.ids.size if stream.runs[-1] else 0, -1, np.int32)
    last = np.full(blocks, -1, np.int64)
    union, counts = np.empty(experts, np.int64), np.zeros(experts, np.int64)
    uses = 0
    for step in range(stream.runs[-1]):
        for layer in range(layers):
            event = step * layers + layer
            found = gather(stream, union, counts, step, layer)
            arrange(union, counts, found, layer * experts, order, seed, event)
            for index in range(found):
                block = union[index]
                counts[block - layer * experts] = 0
                if last[block] >= 0:
                    out[last[block]] = uses if serial else event
                last[block] = uses
                uses += 1
    return out[:uses]


def empty_cache(blocks: int, layers: int, shared: bool) -> Cache:
    """A cache in which nothing has ever been used."""
    pools, experts = 1 if shared else layers, blocks // layers
    return Cache(
        resident=np.zeros(blocks, np.uint8),
        recency=np.full(blocks, -1, np.int64),
        mark=np.full(blocks, -1, np.int64),
        members=np.zeros(blocks, np.int64),
        place=np.zeros(blocks, np.int64),
        size=np.zeros(pools, np.int64),
        used=np.zeros(pools, np.int64),
        left=np.full(blocks, UNSEEN, np.int32),
        upcoming=np.full(blocks, -1, np.int64),
        union=np.empty(experts, np.int64),
        counts=np.zeros(experts, np.int64),
        clock=np.zeros(2, np.int64),
    )
