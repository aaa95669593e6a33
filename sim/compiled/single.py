"""The compiled replay of a stream in which every event is one use: the quickest of the kernels."""

from __future__ import annotations

from typing import Any

from sim.compiled import jit, jit_inlined
from sim.compiled.book import LEFT, STREAMED, Output, Setting, is_counted, write_log
from sim.compiled.counts import (
    ACCESSES,
    ASSIGNMENTS,
    BYTES,
    COLLISIONS,
    COMPULSORY,
    CROWDED,
    EVENTS,
    EVICTIONS,
    HIT_ASSIGNMENTS,
    HITS,
    LOAD,
)
from sim.compiled.stream import Stream
from sim.compiled.twin import (
    ABSENT,
    NOT_NEGATIVE,
    RESIDENT,
    UNSEEN,
    Array,
    Cache,
    admit,
    begin_sequence,
    enter,
    forget,
    leave,
    observe,
    observe_scores,
    touch,
    victim,
)
from traces.schema import NOT_ROUTED


@jit_inlined
def _make_room(policy: Any, cache: Cache, setting: Setting, out: Output, place: tuple[int, ...]) -> int:
    """Lets ``block`` into a full pool of a stream whose blocks weigh the same; returns how many blocks left it."""
    step, decision, pool, block, event = place
    if setting.bypass:
        enter(policy, cache, pool, block, decision)
    other = victim(policy, cache, pool, event, decision, False) & NOT_NEGATIVE
    leave(policy, cache, pool, other, decision)
    forget(policy, other)
    if out.log.shape[0]:
        write_log(cache, out.log, decision, other, STREAMED if other == block else LEFT)
    if other == block:
        return 0
    cache.resident[other] = ABSENT
    cache.left[other] = step
    if not setting.bypass:
        enter(policy, cache, pool, block, decision)
    cache.resident[block] = RESIDENT
    admit(policy, block, event)
    return 1


@jit
def _count_uses(row: Array, uses: int, misses: int, weight: int, room: int) -> None:
    """Counts events of one use each."""
    row[ASSIGNMENTS] += uses
    row[ACCESSES] += uses
    row[EVENTS] += uses
    row[HITS] += uses - misses
    row[HIT_ASSIGNMENTS] += uses - misses
    row[LOAD] += uses * weight
    row[CROWDED] += uses * (weight > room)


@jit
def replay_single(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, begin: int, end: int
) -> None:
    """Replays the runs from ``begin`` to ``end`` of a stream in which every pass is one token, every event one use
    of one block, and all blocks are alike in weight and in bytes. Both contracts mean the same there; decisions are
    uses."""
    ids, layers, experts, pools = stream.ids, stream.ids.shape[1], cache.counts.size, cache.size.size
    room, decision = setting.capacity * pools // layers, cache.clock[0]
    weight, full = stream.weights[0], setting.capacity - stream.weights[0]
    for run in range(begin, end):
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, is_counted(stream, out, run)
        first, misses, idle, compulsory, collisions, evictions = decision, 0, 0, 0, 0, 0
        if stream.starts[run]:
            begin_sequence(policy)
        for step in range(stream.runs[run], stream.runs[run + 1]):
            source = (stream.rows[step] if stream.rows.size else step) & NOT_NEGATIVE
            missed = 0
            for layer in range(layers):
                expert = ids[source, layer, 0]
                if expert == NOT_ROUTED:
                    continue
                pool, block = layer if pools > 1 else 0, (layer * experts + expert) & NOT_NEGATIVE
                if setting.next_use.size:
                    cache.upcoming[block] = setting.next_use[decision]
                if setting.scored:
                    observe_scores(policy, stream, step, step + 1, layer)
                observe(policy, cache, block, 1, step * layers + layer)
                if cache.resident[block]:
                    touch(policy, cache, pool, block, decision)
                else:
                    missed += 1
                    left = cache.left[block]
                    compulsory += left == UNSEEN
                    collisions += left == step
                    if left == UNSEEN:
                        cache.left[block] = -1
                    if cache.used[pool] > full:
                        place = (step, decision, pool, block, step * layers + layer)
                        evictions += _make_room(policy, cache, setting, out, place)
                    else:
                        cache.used[pool] += weight
                        enter(policy, cache, pool, block, decision)
                        cache.resident[block] = RESIDENT
                        admit(policy, block, step * layers + layer)
                decision += 1
            misses += missed
            if missed:
                out.histogram[phase, missed] += counted
            else:
                idle += 1
        _count_uses(row, decision - first, misses, weight, room)
        row[COMPULSORY] += compulsory
        row[COLLISIONS] += collisions
        row[EVICTIONS] += evictions
        row[BYTES] += misses * stream.bytes[0]
        out.histogram[phase, 0] += idle * counted
    cache.clock[0] = decision
