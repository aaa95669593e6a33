"""The replay that asks the policy object: what the compiled one means, and the way of a user's own policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from sim.compiled.book import LEFT, STREAMED, Output, Setting
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
from sim.compiled.stream import SHUFFLED, Stream, bounds
from sim.policies.base import NEVER, EvictionPolicy
from sim.policies.evict.random import mixed
from traces.schema import NOT_ROUTED, Array


class Upcoming:
    """The future as the replay tells it: the decision of each block's next use, as of its last one."""

    def __init__(self, blocks: int) -> None:
        self.at = [NEVER] * blocks

    def next_use(self, block: int, event: int) -> int:
        """The decision of the next use of ``block``; ``event`` does not matter, for it is always the present one."""
        return self.at[block]


class ObjectReplay:
    """One cache and one policy object. :meth:`run` may be called for one part of the stream after the other."""

    def __init__(
        self, policy: EvictionPolicy, future: Upcoming, stream: Stream, setting: Setting, out: Output, *, pools: int
    ) -> None:
        self.policy, self.future, self.stream, self.setting, self.out = policy, future, stream, setting, out
        self.layers, self.experts = stream.ids.shape[1], policy.context.experts
        self.pools: list[set[int]] = [set() for _ in range(pools)]
        self.used = [0] * pools
        self.room = setting.capacity * pools // self.layers
        blocks = policy.context.blocks
        self.recency = list(range(-blocks, 0))
        self.left = [-1] * blocks
        self.seen = [False] * blocks
        self.uses = self.entries = 0

    def preload(self, blocks: Sequence[int]) -> None:
        """Puts ``blocks`` into their pools before the first event."""
        for block in blocks:
            self.pools[self._pool(block)].add(block)
            self.used[self._pool(block)] += int(self.stream.weights[block])

    def run(self, begin: int, end: int, *, serial: bool) -> None:
        """Replays the runs from ``begin`` to ``end``."""
        event_of = self._serial if serial else self._atomic
        for run in range(begin, end):
            row, phase = self.out.table[self.stream.bins[run]], int(self.stream.bins[run]) & 1
            if self.stream.starts[run]:
                self.policy.begin_sequence()
            for step in range(int(self.stream.runs[run]), int(self.stream.runs[run + 1])):
                loaded = int(row[BYTES])
                missed = sum(event_of(row, step, layer, union) for layer, union in self._unions(step))
                self.out.histogram[phase, missed] += int(self.stream.bins[run]) < len(self.out.table) - 1
                if self.out.loads.size:
                    self.out.loads[step] = row[BYTES] - loaded

    def _unions(self, step: int) -> Iterator[tuple[int, dict[int, int]]]:
        """Yields (layer, {block: tokens} in order of appearance) for every event of a pass; tells the policy scores."""
        first, last = bounds(self.stream, step)
        rows = self.stream.rows[first:last] if self.stream.rows.size else np.arange(first, last)
        for layer in range(self.layers):
            union: dict[int, int] = {}
            for expert in self.stream.ids[rows, layer].ravel().tolist():
                if expert != NOT_ROUTED:
                    block = layer * self.experts + expert
                    union[block] = union.get(block, 0) + 1
            if union:
                if self.setting.scored:
                    self.policy.observe_scores(layer, scores_of(self.stream, rows, layer, self.experts))
                yield layer, union

    def _count_event(self, row: Array, union: dict[int, int], layer: int) -> None:
        load = len(union) * int(self.stream.weights[layer * self.experts])
        row[[ACCESSES, ASSIGNMENTS, EVENTS, LOAD]] += [len(union), sum(union.values()), 1, load]
        row[CROWDED] += load > self.room

    def _take(self, row: Array, block: int, tokens: int, step: int) -> bool:
        """Counts one use, and whether it hit."""
        if self.setting.next_use.size:
            use = int(self.setting.next_use[self.uses])
            self.future.at[block] = use if use >= 0 else NEVER
        self.uses += 1
        hit = block in self.pools[self._pool(block)]
        if hit:
            row[[HITS, HIT_ASSIGNMENTS]] += [1, tokens]
            return True
        row[BYTES] += int(self.stream.bytes[block])
        row[COMPULSORY] += not self.seen[block]
        row[COLLISIONS] += self.seen[block] and self.left[block] == step
        self.seen[block] = True
        return False

    def _atomic(self, row: Array, step: int, layer: int, union: dict[int, int]) -> int:
        event, blocks = step * self.layers + layer, sorted(union)
        self._count_event(row, union, layer)
        absent = [block for block in blocks if not self._take(row, block, union[block], step)]
        for block in blocks:
            self.recency[block] = event * len(self.recency) + block
        self.policy.observe(event, blocks, [union[block] for block in blocks])
        pool = self.pools[self._pool(blocks[0])]
        self._settle(row, step, event, absent, lambda: self._weakest(pool, blocks, absent))
        return len(absent)

    def _serial(self, row: Array, step: int, layer: int, union: dict[int, int]) -> int:
        event, missed = step * self.layers + layer, 0
        self._count_event(row, union, layer)
        for block in arranged(list(union), self.setting.order, self.setting.seed, event):
            decision = self.uses
            hit = self._take(row, block, union[block], step)
            self.recency[block] = decision
            self.policy.observe(event, [block], [union[block]])
            pool = self.pools[self._pool(block)]
            absent = [] if hit else [block]
            self._settle(row, step, decision, absent, lambda pool=pool, own=absent: self._weakest(pool, own, own))  # type: ignore[misc]
            missed += not hit
        return missed

    def _weakest(self, pool: set[int], own: Sequence[int], absent: Sequence[int]) -> Iterator[int]:
        """Residents of ``pool`` and ``absent`` in the order in which they leave."""
        policy, recency = self.policy, self.recency
        if policy.bypass:
            yield from policy.order([*pool, *absent], recency)
            return
        yield from policy.order([block for block in pool if block not in own], recency)
        if policy.misses_first:
            yield from policy.order([block for block in own if block in pool], recency)
            yield from policy.order(absent, recency)
        else:
            yield from policy.order(own, recency)

    def _settle(
        self, row: Array, step: int, decision: int, absent: Sequence[int], weakest: Callable[[], Iterator[int]]
    ) -> None:
        """Keeps the longest prefix of the ranking that fits, and tells the policy."""
        if not absent:
            return
        number, weights = self._pool(absent[0]), self.stream.weights
        pool = self.pools[number]
        used = self.used[number] + len(absent) * int(weights[absent[0]])
        gone: list[int] = []
        ranking = weakest()
        while used > self.setting.capacity:
            gone.extend(islice(ranking, 1))
            used -= int(weights[gone[-1]])
        self.used[number] = used
        for block in gone:
            kept = block in pool
            if kept:
                pool.remove(block)
                self.left[block] = step
                row[EVICTIONS] += 1
            self._log(decision, block, LEFT if kept else STREAMED)
            self.policy.forget(block)
        for block in absent:
            if block not in gone:
                pool.add(block)
                self.policy.admit(block)

    def _pool(self, block: int) -> int:
        return block // self.experts if len(self.pools) > 1 else 0

    def _log(self, *entry: int) -> None:
        if len(self.out.log):
            self.out.log[self.entries] = entry
            self.entries += 1


def scores_of(stream: Stream, rows: Array, layer: int, experts: int) -> Array:
    """The router's scores of an event, float64 [n, E]; from the gates of the chosen experts where there are no more."""
    if stream.scores.size:
        return np.asarray(stream.halves[stream.scores[rows, layer]])
    scores = np.zeros((len(rows), experts))
    for token, row in enumerate(rows):
        for expert, gate in zip(stream.ids[row, layer], stream.gates[row, layer], strict=True):
            if expert != NOT_ROUTED:
                scores[token, expert] = stream.halves[gate]
    return scores


def arranged(blocks: list[int], order: int, seed: int, event: int) -> list[int]:
    """``blocks``, which come in order of appearance, in the order of :func:`sim.compiled.stream.arrange`."""
    if order == 0:
        return blocks
    blocks = sorted(blocks)
    if order == SHUFFLED:
        for last in range(len(blocks) - 1, 0, -1):
            other = mixed(seed, event, last) % (last + 1)
            blocks[last], blocks[other] = blocks[other], blocks[last]
    return blocks
