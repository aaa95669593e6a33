"""What every kernel is handed, and the book that it keeps: departures, misses, and the counts of an event and a pass.

The columns of the table of counts stand in ``sim/compiled/counts.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sim.compiled import jit, jit_inlined
from sim.compiled.counts import ACCESSES, COLLISIONS, COMPULSORY, CROWDED, EVENTS, EVICTIONS, LOAD
from sim.compiled.stream import Stream
from sim.compiled.twin import ABSENT, RESIDENT, UNSEEN, Array, Cache, enter, forget, leave

LEFT, STREAMED = 0, 1
"""Kinds of entries in the log: a block that left, and one that was used without being kept."""


class Setting(NamedTuple):
    """How a stream is replayed."""

    capacity: int  # of a pool
    bypass: bool
    misses_first: bool
    scored: bool  # the policy takes in scores
    order: int  # of the uses of an event
    seed: int
    next_use: Array  # int32 [uses], see next_uses; empty where it is not asked for


class Output(NamedTuple):
    """What comes of a replay."""

    table: Array  # int64 [bins, columns]
    histogram: Array  # int64 [2, L * E + 1], passes by phase and number of misses
    loads: Array  # int64 [S], bytes loaded in a pass; empty where all blocks have the same bytes
    log: Array  # int64 [entries, 3]: decision, block, kind; empty for none


@jit
def preload(policy: Any, cache: Cache, stream: Stream, blocks: Array) -> None:
    """Puts ``blocks`` into their pools before the first event."""
    experts, pools = cache.counts.size, cache.size.size
    for block in blocks:
        pool = block // experts if pools > 1 else 0
        enter(policy, cache, pool, block, -1)
        cache.used[pool] += stream.weights[block]
        cache.resident[block] = RESIDENT


@jit
def write_log(cache: Cache, log: Array, decision: int, block: int, kind: int) -> None:
    if log.shape[0]:
        entry = cache.clock[1]
        log[entry, 0], log[entry, 1], log[entry, 2] = decision, block, kind
        cache.clock[1] = entry + 1


@jit_inlined
def put_out(
    policy: Any, cache: Cache, out: Output, row: Array, pool: int, block: int, decision: int, step: int
) -> None:
    """Takes ``block`` out of its pool: a resident, or one that was only ranked with them."""
    leave(policy, cache, pool, block, decision)
    if cache.resident[block] == RESIDENT:
        cache.left[block] = step
        row[EVICTIONS] += 1
        write_log(cache, out.log, decision, block, LEFT)
    else:
        write_log(cache, out.log, decision, block, STREAMED)
    cache.resident[block] = ABSENT
    forget(policy, block)


@jit
def count_miss(cache: Cache, row: Array, block: int, step: int) -> None:
    if cache.left[block] == UNSEEN:
        cache.left[block] = -1
        row[COMPULSORY] += 1
    elif cache.left[block] == step:
        row[COLLISIONS] += 1


@jit
def is_counted(stream: Stream, out: Output, run: int) -> bool:
    """Whether a run is more than warm-up, whose row of the table is the last."""
    last: int = out.table.shape[0] - 1
    return bool(stream.bins[run] < last)


@jit
def count_event(row: Array, found: int, load: int, room: int) -> None:
    row[ACCESSES] += found
    row[EVENTS] += 1
    row[LOAD] += load
    row[CROWDED] += load > room


@jit_inlined
def end_pass(out: Output, phase: int, step: int, missed: int, loaded: int, counted: bool) -> None:
    """Counts a pass by its number of misses, and keeps its bytes where the misses do not tell them."""
    out.histogram[phase, missed] += counted
    if out.loads.size:
        out.loads[step] = loaded
