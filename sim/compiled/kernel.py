"""The compiled replay: the events of a stream against a cache, under the atomic or the serial contract.

Each kernel is compiled once for every twin, by the type of its state. What is counted stands in
``sim/compiled/counts.py``, the operations of a twin in ``sim/compiled/twin.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sim.compiled import jit, jit_inlined
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
from sim.compiled.stream import ASCENDING, Stream, arrange, bounds, gather
from sim.compiled.twin import (
    ABSENT,
    NOT_NEGATIVE,
    RANKED,
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
    own_victim,
    touch,
    victim,
)
from traces.schema import NOT_ROUTED

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
def _log(cache: Cache, log: Array, decision: int, block: int, kind: int) -> None:
    if log.shape[0]:
        entry = cache.clock[1]
        log[entry, 0], log[entry, 1], log[entry, 2] = decision, block, kind
        cache.clock[1] = entry + 1


@jit_inlined
def _go(policy: Any, cache: Cache, out: Output, row: Array, pool: int, block: int, decision: int, step: int) -> None:
    """Takes ``block`` out of its pool: a resident, or one that was only ranked with them."""
    leave(policy, cache, pool, block, decision)
    if cache.resident[block] == RESIDENT:
        cache.left[block] = step
        row[EVICTIONS] += 1
        _log(cache, out.log, decision, block, LEFT)
    else:
        _log(cache, out.log, decision, block, STREAMED)
    cache.resident[block] = ABSENT
    forget(policy, block)


@jit
def _count_miss(cache: Cache, row: Array, block: int, step: int) -> None:
    if cache.left[block] == UNSEEN:
        cache.left[block] = -1
        row[COMPULSORY] += 1
    elif cache.left[block] == step:
        row[COLLISIONS] += 1


@jit
def _observe_event(
    policy: Any, cache: Cache, setting: Setting, row: Array, step: int, event: int, base: int, found: int
) -> int:
    """Takes in an event and classifies its blocks; returns how many hit."""
    hits, tokens, hit_tokens = 0, 0, 0
    for index in range(found):
        block = cache.union[index]
        count = cache.counts[block - base]
        cache.counts[block - base] = 0
        tokens += count
        cache.mark[block] = event
        if setting.next_use.size:
            cache.upcoming[block] = setting.next_use[cache.clock[0] + index]
        if cache.resident[block]:
            hits += 1
            hit_tokens += count
        else:
            _count_miss(cache, row, block, step)
        observe(policy, cache, block, count, event)
    cache.clock[0] += found
    row[ASSIGNMENTS] += tokens
    row[HIT_ASSIGNMENTS] += hit_tokens
    return hits


@jit_inlined
def _force(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, row: Array, place: tuple[int, ...]
) -> None:
    """Admits the blocks of an event, ``place[4]`` of which are missing, before all others, as far as they fit."""
    step, event, pool, found, missing = place
    weight = stream.weights[cache.union[0]]
    used = cache.used[pool] + missing * weight
    while used > setting.capacity:
        block = victim(policy, cache, pool, event, event, True)
        if block < 0:
            break
        used -= stream.weights[block]
        _go(policy, cache, out, row, pool, block, event, step)
    while used > setting.capacity:
        block = own_victim(policy, cache, pool, found, event, setting.misses_first)
        cache.mark[block] = -1
        used -= weight
        if cache.resident[block]:
            _go(policy, cache, out, row, pool, block, event, step)
        else:
            forget(policy, block)
            _log(cache, out.log, event, block, STREAMED)
    cache.used[pool] = used
    for index in range(found):
        block = cache.union[index]
        if cache.resident[block]:
            touch(policy, cache, pool, block, event)
        elif cache.mark[block] == event:
            enter(policy, cache, pool, block, event)
            cache.resident[block] = RESIDENT
            admit(policy, block, event)


@jit_inlined
def _rank(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, row: Array, place: tuple[int, ...]
) -> None:
    """Ranks the blocks of an event together with the residents, and keeps what fits."""
    step, event, pool, found, missing = place
    used = cache.used[pool] + missing * stream.weights[cache.union[0]]
    for index in range(found):
        block = cache.union[index]
        if cache.resident[block]:
            touch(policy, cache, pool, block, event)
        else:
            enter(policy, cache, pool, block, event)
            cache.resident[block] = RANKED
    while used > setting.capacity:
        block = victim(policy, cache, pool, event, event, False)
        used -= stream.weights[block]
        _go(policy, cache, out, row, pool, block, event, step)
    cache.used[pool] = used
    for index in range(found):
        block = cache.union[index]
        if cache.resident[block] == RANKED:
            cache.resident[block] = RESIDENT
            admit(policy, block, event)


@jit
def _is_counted(stream: Stream, out: Output, run: int) -> bool:
    """Whether a run is more than warm-up, whose row of the table is the last."""
    last: int = out.table.shape[0] - 1
    return bool(stream.bins[run] < last)


@jit
def replay_atomic(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, begin: int, end: int
) -> None:
    """Replays the runs from ``begin`` to ``end``: an event is classified as a whole, then the cache is changed."""
    layers, experts, pools = stream.ids.shape[1], cache.counts.size, cache.size.size
    room = setting.capacity * pools // layers
    for run in range(begin, end):
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, _is_counted(stream, out, run)
        if stream.starts[run]:
            begin_sequence(policy)
        for step in range(stream.runs[run], stream.runs[run + 1]):
            missed = 0
            for layer in range(layers):
                event, pool = step * layers + layer, layer if pools > 1 else 0
                found = gather(stream, cache.union, cache.counts, step, layer)
                if not found:
                    continue
                arrange(cache.union, cache.counts, found, layer * experts, ASCENDING, 0, event)
                if setting.scored:
                    first, last = bounds(stream, step)
                    observe_scores(policy, stream, first, last, layer)
                hits = _observe_event(policy, cache, setting, row, step, event, layer * experts, found)
                if setting.bypass:
                    _rank(policy, cache, stream, setting, out, row, (step, event, pool, found, found - hits))
                else:
                    _force(policy, cache, stream, setting, out, row, (step, event, pool, found, found - hits))
                missed += found - hits
                row[HITS] += hits
                row[BYTES] += (found - hits) * stream.bytes[layer * experts]
                _count_event(row, found, found * stream.weights[layer * experts], room)
            out.histogram[phase, missed] += counted


@jit
def _count_event(row: Array, found: int, load: int, room: int) -> None:
    row[ACCESSES] += found
    row[EVENTS] += 1
    row[LOAD] += load
    row[CROWDED] += load > room


@jit_inlined
def _serve(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, row: Array, place: tuple[int, ...]
) -> None:
    """Serves a block that missed: lets it in, and those out that it displaces."""
    step, decision, pool, block = place
    weight, event = stream.weights[block], step * stream.ids.shape[1] + block // cache.counts.size
    row[BYTES] += stream.bytes[block]
    _count_miss(cache, row, block, step)
    used = cache.used[pool] + weight
    if setting.bypass:
        enter(policy, cache, pool, block, decision)
        cache.resident[block] = RANKED
    while used > setting.capacity:
        other = victim(policy, cache, pool, event, decision, False)
        used -= stream.weights[other]
        _go(policy, cache, out, row, pool, other, decision, step)
    cache.used[pool] = used
    if not setting.bypass:
        enter(policy, cache, pool, block, decision)
    if not setting.bypass or cache.resident[block]:
        cache.resident[block] = RESIDENT
        admit(policy, block, event)


@jit
def replay_serial(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, begin: int, end: int
) -> None:
    """Replays the runs from ``begin`` to ``end``: the experts of an event are looked up one after the other."""
    layers, experts, pools = stream.ids.shape[1], cache.counts.size, cache.size.size
    room, decision = setting.capacity * pools // layers, cache.clock[0]
    for run in range(begin, end):
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, _is_counted(stream, out, run)
        if stream.starts[run]:
            begin_sequence(policy)
        for step in range(stream.runs[run], stream.runs[run + 1]):
            missed = 0
            for layer in range(layers):
                event, pool, base = step * layers + layer, layer if pools > 1 else 0, layer * experts
                found = gather(stream, cache.union, cache.counts, step, layer)
                if not found:
                    continue
                arrange(cache.union, cache.counts, found, base, setting.order, setting.seed, event)
                if setting.scored:
                    first, last = bounds(stream, step)
                    observe_scores(policy, stream, first, last, layer)
                for index in range(found):
                    block = cache.union[index]
                    count = cache.counts[block - base]
                    cache.counts[block - base] = 0
                    row[ASSIGNMENTS] += count
                    if setting.next_use.size:
                        cache.upcoming[block] = setting.next_use[decision]
                    observe(policy, cache, block, count, event)
                    if cache.resident[block]:
                        row[HITS] += 1
                        row[HIT_ASSIGNMENTS] += count
                        touch(policy, cache, pool, block, decision)
                    else:
                        missed += 1
                        _serve(policy, cache, stream, setting, out, row, (step, decision, pool, block))
                    decision += 1
                _count_event(row, found, found * stream.weights[base], room)
            out.histogram[phase, missed] += counted
    cache.clock[0] = decision


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
        _log(cache, out.log, decision, other, STREAMED if other == block else LEFT)
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
def _count_uses(row: Array, uses: int, hits: int) -> None:
    """Counts events of one use each."""
    row[ASSIGNMENTS] += uses
    row[ACCESSES] += uses
    row[EVENTS] += uses
    row[HITS] += hits
    row[HIT_ASSIGNMENTS] += hits


@jit
def replay_single(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, begin: int, end: int
) -> None:
    """Replays the runs from ``begin`` to ``end`` of a stream in which every pass is one token, every event one use
    of one block, and all blocks weigh the same. Both contracts mean the same there; decisions are uses."""
    ids, layers, experts, pools = stream.ids, stream.ids.shape[1], cache.counts.size, cache.size.size
    room, decision = setting.capacity * pools // layers, cache.clock[0]
    weight, full = stream.weights[0], setting.capacity - stream.weights[0]
    for run in range(begin, end):
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, _is_counted(stream, out, run)
        first, misses, idle, compulsory, collisions, evictions, loaded = decision, 0, 0, 0, 0, 0, 0
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
                    loaded += stream.bytes[layer * experts]
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
        uses = decision - first
        _count_uses(row, uses, uses - misses)
        row[COMPULSORY] += compulsory
        row[COLLISIONS] += collisions
        row[EVICTIONS] += evictions
        row[BYTES] += loaded
        row[LOAD] += uses * weight
        row[CROWDED] += uses * (weight > room)
        out.histogram[phase, 0] += idle * counted
    cache.clock[0] = decision
