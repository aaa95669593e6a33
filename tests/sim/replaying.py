"""Replays for the tests: random traces, the ways to replay one, and a recount that trusts nothing but the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from sim.compiled.book import LEFT
from sim.compiled.counts import COLUMNS
from sim.policies import EVICTION, PolicyContext
from sim.policies.base import NEVER
from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.objects import arranged
from sim.replay.result import Replay
from sim.replay.run import replay
from sim.replay.settings import ORDERS
from traces.schema import NOT_ROUTED, Array, Trace, TraceHeader
from traces.synthetic import Sizes, markov

EVERY = pytest.mark.parametrize("name", [*EVICTION])
"""A test of every registered policy."""

EAGER: Mapping[str, Mapping[str, Any]] = {
    "belady-imitator": {"hidden": 3, "horizon": 4, "updates": 5},
    "lfu-decay": {"window": 3},
    "s3fifo": {"small": 0.3, "promotion": 1},
    "window-score": {"window": 2},
}
"""Options under which a policy does on a short trace, or in short, what it else does on a long one only."""


SIZES = (100, 60, 250)
"""Bytes of an expert, by layer, where they differ."""


def options_of(name: str) -> Mapping[str, Any]:
    """The options of the tests for the policy of that name."""
    return EAGER.get(name, {})


# Traces.


@st.composite
def traces(draw: st.DrawFn, *, tokens: bool = False, unequal: bool | None = None, most_k: int = 3) -> Trace:
    """Small random traces with gates and scores: a few sequences of uneven length, holes, prompts in one or two passes.

    ``tokens``: every pass is one token. ``unequal``: the sizes of experts differ between layers; None is either.
    """
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(most_k, experts)))
    longest = 0 if tokens else draw(st.sampled_from([0, 4]))
    lengths = [(draw(st.integers(0, longest)), draw(st.integers(1, 7))) for _ in range(draw(st.integers(1, 3)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    differ = draw(st.booleans()) if unequal is None else unequal
    ids, scores = routing(rng, sum(map(sum, lengths)), layers, experts, top_k)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.15]))] = NOT_ROUTED
    return trace_of_rows(ids, lengths, SIZES[:layers] if differ else (100,) * layers, scores, cut=draw(st.booleans()))


def routing(rng: np.random.Generator, rows: int, layers: int, experts: int, top_k: int) -> tuple[Array, Array]:
    """Distinct ids uint16 [rows, L, K], low ones more often, and scores float64 [rows, L, E] of which they are the
    largest; the scores of a token are distinct."""
    noise = rng.random((rows, layers, experts)) + 0.1 * np.arange(experts, 0, -1)
    ranks = np.argsort(np.argsort(noise, axis=-1), axis=-1)
    scores = (ranks + 1.0) / (experts * (experts + 1) / 2)
    ids = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.uint16)
    return ids, scores


def trace_of_rows(
    ids: Array, lengths: Sequence[tuple[int, int]], sizes: Sequence[int], scores: Array, *, cut: bool = False
) -> Trace:
    """A trace of sequences with (prompt, new) ``lengths``, one after the other; a prompt in two passes when ``cut``."""
    passes, position, sequence, phase = [], [], [], []
    step = 0
    for number, (prompt, new) in enumerate(lengths):
        for place in range(prompt + new):
            first_of_pass = place == 0 or place >= prompt or (cut and place == prompt // 2)
            step += first_of_pass
            passes.append(step - 1)
            position.append(place)
            sequence.append(number)
            phase.append(place >= prompt)
    header = TraceHeader(
        model="random",
        layers=ids.shape[1],
        experts=scores.shape[2],
        top_k=ids.shape[2],
        expert_bytes=tuple(sizes),
    )
    chosen = np.minimum(ids, scores.shape[2] - 1).astype(np.int64)
    return Trace.of(
        header,
        expert_ids=ids,
        gates=np.take_along_axis(scores, chosen, axis=-1),
        scores=scores,
        token_ids=np.zeros(len(ids)),
        sequence=sequence,
        position=position,
        step=passes,
        phase=phase,
    )


# Ways to replay a trace.


@st.composite
def ways(draw: st.DrawFn, trace: Trace, name: str, contract: Any, scope: Any, *, slots: bool = False) -> Settings:
    """Settings for ``trace``: any capacity in slots or bytes, order, seed, carried or fresh."""
    in_bytes = False if slots else draw(st.booleans())
    return Settings(
        name,
        draw(capacities(trace.header, scope, in_bytes)),
        scope=scope,
        contract=contract,
        order=draw(st.sampled_from(ORDERS)),
        sequences=draw(st.sampled_from(["carry", "fresh"])),
        seed=draw(st.integers(0, 2**32)),
        options=options_of(name),
    )


def capacities(header: TraceHeader, scope: str, in_bytes: bool) -> st.SearchStrategy[Capacity]:
    """Capacities of a pool that hold an expert at least, and at most all of them."""
    sizes = header.expert_bytes
    if in_bytes:
        most = sum(sizes) * header.experts
        most = most if scope == "global" else most // header.layers
        return st.integers(max(sizes), max(most, max(sizes))).map(
            lambda amount: Capacity(amount, "bytes", f"{amount}B")
        )
    most = header.experts * (header.layers if scope == "global" else 1)
    return st.integers(1, most).map(lambda amount: Capacity(amount, "slots", str(amount)))


@st.composite
def feeds(draw: st.DrawFn, *, warm: bool = False, **shape: Any) -> Feed:
    """Random traces over one to three lanes; some passes warm the cache up when ``warm``."""
    trace, batch = draw(traces(**shape)), draw(st.integers(1, 3))
    passes = len(Feed.of(trace, batch).plan)
    return Feed.of(trace, batch, draw(st.integers(0, passes - 1)) if warm else 0)


def calibration_for(feed: Feed) -> TraceCalibration:
    """What a fitted policy learns from in these tests: a made-up trace of as many layers and experts."""
    return _calibration(feed.trace.header.layers, feed.trace.header.experts)


@cache
def _calibration(layers: int, experts: int) -> TraceCalibration:
    ids, scores = routing(np.random.default_rng(7), 12, layers, experts, top_k=2)
    return TraceCalibration(Feed.of(trace_of_rows(ids, [(2, 10)], (100,) * layers, scores)))


def play(feed: Feed, way: Settings, *, by_object: bool = False) -> Replay:
    """The replay with its log; a policy that is fitted learns from :func:`calibration_for`."""
    fitted = "calibration" in EVICTION[way.policy].needs
    return replay(feed, way, calibration=calibration_for(feed) if fitted else None, by_object=by_object, log=True)


def decisions(log: Array) -> list[tuple[int, ...]]:
    """The entries of a log, in an order that does not depend on that of the departures of one decision."""
    return sorted(map(tuple, log.tolist()))


@cache
def longer_feed(batch: int = 1) -> Feed:
    """Some hundred passes of a few requests over three layers of twelve experts."""
    sizes = Sizes(sequences=4, prompt_tokens=10, new_tokens=40, layers=3, experts=12, top_k=3, skew=0.7, scores=True)
    return Feed.of(markov(np.random.default_rng(0), sizes), batch)


def fingerprint(name: str) -> str:
    """A digest of what a policy object decides on :func:`longer_feed`, under both contracts."""
    digest = sha256()
    for contract in ("atomic", "serial"):
        way = Settings(name, Capacity(4, "slots", "4"), contract=contract, seed=3, options=options_of(name))
        digest.update(play(longer_feed(), way, by_object=True).log.tobytes())
    return digest.hexdigest()


# The recount.


@dataclass
class Recount:
    """What the log of a replay says, when it is counted by hand. ``uses``: (decision, block, whether it hit);
    ``misses[step, layer]``: distinct experts that missed; ``preloaded``: what was there before the first pass."""

    table: Array
    histogram: Array
    uses: list[tuple[int, int, bool]] = field(default_factory=list)
    misses: dict[tuple[int, int], int] = field(default_factory=dict)
    preloaded: frozenset[int] = frozenset()

    @property
    def hits(self) -> list[tuple[int, int]]:
        """(index of the use, block) of every use that hit."""
        return [(index, block) for index, (_, block, hit) in enumerate(self.uses) if hit]


def preloaded(feed: Feed, way: Settings) -> frozenset[int]:
    """The blocks that the policy asks for before the first event."""
    kind, header = EVICTION[way.policy], feed.trace.header
    context = PolicyContext(
        header.layers,
        header.experts,
        header.top_k,
        Unknown(),
        calibration_for(feed),
        way.capacity.amount,
        way.capacity.weights(header),
        way.scope == "global",
        way.seed,
        way.options,
    )
    return frozenset(kind(context).preload())


class Unknown:
    """A future in which nothing comes."""

    def next_use(self, block: int, event: int) -> int:
        return NEVER


def events(feed: Feed) -> Iterator[tuple[int, int, dict[int, int]]]:
    """Yields (pass, layer, {block: tokens} in order of first appearance) for every event with a routed token."""
    header, plan = feed.trace.header, feed.plan
    for step in range(len(plan)):
        rows = plan.rows[plan.offsets[step] : plan.offsets[step + 1]]
        for layer in range(header.layers):
            union: dict[int, int] = {}
            for expert in feed.trace.expert_ids[rows, layer].ravel().tolist():
                if expert != NOT_ROUTED:
                    block = layer * header.experts + expert
                    union[block] = union.get(block, 0) + 1
            if union:
                yield step, layer, union


def recount(outcome: Replay) -> Recount:
    """Follows the log from an empty cache (or what was preloaded), checks that every departure was allowed and needed,
    and counts again. Raises AssertionError where the log breaks the contract."""
    return _Recounting(outcome).run()


class _Recounting:
    """The residents of every pool, as the log has them so far."""

    def __init__(self, outcome: Replay) -> None:
        self.feed, self.way = outcome.feed, outcome.settings
        header = self.feed.trace.header
        self.kind, self.layers, self.experts = EVICTION[self.way.policy], header.layers, header.experts
        self.sizes, self.weights = header.expert_bytes, self.way.capacity.weights(header)
        self.room = self.way.capacity.amount
        self.at_once = self.way.contract == "atomic" and not self.feed.single
        self.count = Recount(np.zeros_like(outcome.table), np.zeros_like(outcome.histogram))
        self.count.preloaded = preloaded(self.feed, self.way)
        self.gone: dict[int, dict[int, int]] = defaultdict(dict)
        for decision, block, kind in outcome.log.tolist():
            assert block not in self.gone[decision]
            self.gone[decision][block] = kind
        self.empty()

    def empty(self) -> None:
        self.seen: set[int] = set()
        self.left: dict[int, int] = {}
        self.resident = set(self.count.preloaded)
        for pool in range(self.layers):
            assert self.weight(self.pool_of(pool * self.experts)) <= self.room

    def pool_of(self, block: int) -> set[int]:
        """The residents of the pool of ``block``."""
        if self.way.scope == "global":
            return self.resident
        return {other for other in self.resident if other // self.experts == block // self.experts}

    def weight(self, blocks: set[int]) -> int:
        return sum(self.weights[block // self.experts] for block in blocks)

    def run(self) -> Recount:
        plan, missed = self.feed.plan, np.zeros(len(self.feed.plan), np.int64)
        before = 0
        for step, layer, union in events(self.feed):
            if plan.group[step] != before and self.way.sequences == "fresh":
                self.empty()
            before = plan.group[step]
            self.event(step, layer, union)
            missed[step] += self.count.misses[step, layer]
        for step in range(self.feed.warmup_steps, len(plan)):
            self.count.histogram[plan.phase[step], missed[step]] += 1
        assert not self.gone, "no departure without a decision"
        return self.count

    def row(self, step: int) -> Array:
        plan = self.feed.plan
        warm = step < self.feed.warmup_steps
        row: Array = self.count.table[-1 if warm else 2 * plan.group[step] + plan.phase[step]]
        return row

    def event(self, step: int, layer: int, union: dict[int, int]) -> None:
        number, load = step * self.layers + layer, len(union) * self.weights[layer]
        share = self.room / (self.layers if self.way.scope == "global" else 1)
        self.add(step, events=1, load=load, crowded=load > share)
        self.count.misses[step, layer] = 0
        if self.at_once:
            self.decide(step, number, union)
            return
        for block in arranged([*union], ORDERS.index(self.way.order), self.way.seed, number):
            self.decide(step, len(self.count.uses), {block: union[block]})

    def decide(self, step: int, decision: int, union: dict[int, int]) -> None:
        """One decision: all of ``union`` is looked up, then the log says who goes."""
        pool = self.pool_of(min(union))
        absent = {block for block in union if block not in pool}
        for block in sorted(union):
            self.use(step, decision, block, union[block], hit=block not in absent)
        gone = self.gone.pop(decision, {})
        left = {block for block, kind in gone.items() if kind == LEFT}
        assert left <= pool
        assert {*gone} - left <= absent
        self.check_order({*union}, absent, pool, {*gone})
        self.resident = self.resident - left | (absent - {*gone})
        self.left |= dict.fromkeys(left, step)
        after = self.weight(self.pool_of(min(union)))
        assert after <= self.room
        assert not gone or after + max(self.weight({block}) for block in gone) > self.room, "room without need"
        self.add(step, evictions=len(left))

    def check_order(self, own: set[int], absent: set[int], pool: set[int], gone: set[int]) -> None:
        """What was just used stays before the rest, and what was loaded before what hit, as the policy declares."""
        assert absent or not gone
        if not self.kind.bypass:
            assert not gone & own or pool - own <= gone
            assert self.at_once or not gone & own, "who is served alone is kept"
        if self.kind.misses_first:
            assert not gone & absent or own - absent <= gone

    def use(self, step: int, decision: int, block: int, tokens: int, *, hit: bool) -> None:
        self.count.uses.append((decision, block, hit))
        self.add(step, accesses=1, assignments=tokens, hits=hit, hit_assignments=tokens * hit)
        if not hit:
            self.count.misses[step, block // self.experts] += 1
            again = block in self.seen
            same_pass = again and self.left.get(block) == step
            self.add(step, bytes=self.sizes[block // self.experts], compulsory=not again, collisions=same_pass)
            self.seen.add(block)

    def add(self, step: int, **counts: int) -> None:
        row = self.row(step)
        for name, amount in counts.items():
            row[COLUMNS.index(name)] += amount
