"""The compiled replay: the events of a stream against a cache, under the atomic or the serial contract.

Each kernel is compiled once for every twin, by the type of its state. What is counted stands in
``sim/compiled/book.py``, the operations of a twin in ``sim/compiled/twin.py``.
"""

from __future__ import annotations

from typing import Any

from sim.compiled import jit, jit_inlined
from sim.compiled.book import (
    STREAMED,
    Output,
    Setting,
    count_event,
    count_miss,
    end_pass,
    is_counted,
    put_out,
    write_log,
)
from sim.compiled.counts import ASSIGNMENTS, BYTES, HIT_ASSIGNMENTS, HITS
from sim.compiled.stream import ASCENDING, Stream, arrange, bounds, gather
from sim.compiled.twin import (
    RANKED,
    RESIDENT,
    Array,
    Cache,
    admit,
    begin_sequence,
    enter,
    forget,
    observe,
    observe_scores,
    own_victim,
    touch,
    victim,
)


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
            count_miss(cache, row, block, step)
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
        put_out(policy, cache, out, row, pool, block, event, step)
    while used > setting.capacity:
        block = own_victim(policy, cache, pool, found, event, setting.misses_first)
        cache.mark[block] = -1
        used -= weight
        if cache.resident[block]:
            put_out(policy, cache, out, row, pool, block, event, step)
        else:
            forget(policy, block)
            write_log(cache, out.log, event, block, STREAMED)
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
        put_out(policy, cache, out, row, pool, block, event, step)
    cache.used[pool] = used
    for index in range(found):
        block = cache.union[index]
        if cache.resident[block] == RANKED:
            cache.resident[block] = RESIDENT
            admit(policy, block, event)


@jit
def replay_atomic(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, begin: int, end: int
) -> None:
    """Replays the runs from ``begin`` to ``end``: an event is classified as a whole, then the cache is changed."""
    layers, experts, pools = stream.ids.shape[1], cache.counts.size, cache.size.size
    room = setting.capacity * pools // layers
    for run in range(begin, end):
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, is_counted(stream, out, run)
        if stream.starts[run]:
            begin_sequence(policy)
        for step in range(stream.runs[run], stream.runs[run + 1]):
            missed, loaded = 0, row[BYTES]
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
                count_event(row, found, found * stream.weights[layer * experts], room)
            end_pass(out, phase, step, missed, row[BYTES] - loaded, counted)


@jit_inlined
def _serve(
    policy: Any, cache: Cache, stream: Stream, setting: Setting, out: Output, row: Array, place: tuple[int, ...]
) -> None:
    """Serves a block that missed: lets it in, and those out that it displaces."""
    step, decision, pool, block = place
    weight, event = stream.weights[block], step * stream.ids.shape[1] + block // cache.counts.size
    row[BYTES] += stream.bytes[block]
    count_miss(cache, row, block, step)
    used = cache.used[pool] + weight
    if setting.bypass:
        enter(policy, cache, pool, block, decision)
        cache.resident[block] = RANKED
    while used > setting.capacity:
        other = victim(policy, cache, pool, event, decision, False)
        used -= stream.weights[other]
        put_out(policy, cache, out, row, pool, other, decision, step)
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
        row, phase, counted = out.table[stream.bins[run]], stream.bins[run] & 1, is_counted(stream, out, run)
        if stream.starts[run]:
            begin_sequence(policy)
        for step in range(stream.runs[run], stream.runs[run + 1]):
            missed, loaded = 0, row[BYTES]
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
                count_event(row, found, found * stream.weights[base], room)
            end_pass(out, phase, step, missed, row[BYTES] - loaded, counted)
    cache.clock[0] = decision
