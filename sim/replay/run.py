"""Replaying a feed: through the compiled twin of the policy where there is one, else through the policy object."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sim.compiled import book, kernel, single
from sim.compiled.counts import COLUMNS
from sim.compiled.stream import ASCENDING, Stream, empty_cache, next_uses
from sim.compiled.twins import TWINS
from sim.policies import EVICTION
from sim.policies.base import Calibration, EvictionPolicy, PolicyContext
from sim.replay.feed import Feed
from sim.replay.objects import ObjectReplay, Upcoming
from sim.replay.result import Replay
from sim.replay.settings import ORDERS, Settings
from traces.errors import InputError, unknown_name
from traces.schema import Array

_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def replay(
    feed: Feed,
    settings: Settings,
    *,
    policy: type[EvictionPolicy] | None = None,
    calibration: Calibration | None = None,
    by_object: bool = False,
    log: bool = False,
    progress: Callable[[int], None] = lambda passes: None,
) -> Replay:
    """Replays ``feed``, without a clock: which uses hit, what was loaded, who left.

    ``policy`` is a class for the name in ``settings``, when it is not a registered one. ``calibration`` is the trace
    that fitted policies learn from. The policy object decides when ``by_object``, or when it has no compiled twin.
    ``log`` keeps every departure. ``progress`` is told how many passes were replayed. What numba has to compile is not
    part of ``seconds``; what a policy learns, and the search for next uses, is. Raises :class:`InputError` for an
    unknown policy, for one that needs what is not there, and for constants that it does not have or refuses.
    """
    kind = policy or find_policy(settings.policy)
    check_inputs(feed, kind, calibration)
    session = _Session(feed, settings, kind, calibration, log)
    compiled = kind in TWINS and not by_object
    if compiled:
        session.compile()
    started = time.perf_counter() - session.learning_s
    session.look_ahead()
    for group in session.parts():
        part = session.begin(compiled)
        for run in group:
            part(run)
            progress(int(feed.runs[run + 1] - feed.runs[run]))
    return session.result(time.perf_counter() - started)


def find_policy(name: str) -> type[EvictionPolicy]:
    """The eviction policy of that name; raises :class:`InputError` with the near ones for an unknown name."""
    if name not in EVICTION:
        raise unknown_name("policy", name, EVICTION)
    return EVICTION[name]


def check_inputs(feed: Feed, kind: type[EvictionPolicy], calibration: Calibration | None) -> None:
    """Raises :class:`InputError` when ``kind`` needs what neither the trace nor the caller gives."""
    if "scores" in kind.needs and feed.trace.scores is None and feed.trace.gates is None:
        raise InputError(f"trace must have the router's scores, or at least gates, for {kind.name}, got neither")
    if "calibration" in kind.needs and calibration is None:
        raise InputError(f"{kind.name} must be given a calibration trace, disjoint from the one replayed, got none")


class _Session:
    """One replay on its way: the stream, the counts so far, and the cache and policy of the group at hand."""

    def __init__(
        self, feed: Feed, settings: Settings, kind: type[EvictionPolicy], calibration: Calibration | None, log: bool
    ) -> None:
        header = feed.trace.header
        self.feed, self.settings, self.kind = feed, settings, kind
        self.layers, self.blocks = header.layers, header.layers * header.experts
        self.shared = settings.scope == "global"
        self.serial = settings.contract == "serial"
        self.by_use = self.serial or feed.single  # both contracts mean the same where an event is one use
        self.alike = len(set(header.expert_bytes)) == 1
        self.context = PolicyContext(
            header.layers,
            header.experts,
            header.top_k,
            calibration=calibration,
            capacity=settings.capacity.amount,
            weights=settings.capacity.weights(header),
            shared=self.shared,
            seed=settings.seed,
            options=settings.options,
        )
        self.stream = stream_of(feed, self.context.weights, scored="scores" in kind.needs)
        self.setting = book.Setting(
            capacity=settings.capacity.amount,
            bypass=kind.bypass,
            misses_first=kind.misses_first,
            scored="scores" in kind.needs,
            order=ORDERS.index(settings.order),
            seed=settings.seed,
            next_use=np.empty(0, np.int32),
        )
        entries = 2 * feed.assignments if log else 0
        self.out = book.Output(
            table=np.zeros((2 * feed.plan.groups + 1, len(COLUMNS)), np.int64),
            histogram=np.zeros((2, self.blocks + 1), np.int64),
            loads=np.zeros(0 if self.alike else len(feed.plan), np.int64),
            log=np.full((entries, 3), -1, np.int64),
        )
        self.learning_s = 0.0
        self.loaded: list[int] = []

        self.last: Any = None

    def look_ahead(self) -> None:
        """Works out the next uses, for a policy that knows the future."""
        if "future" in self.kind.needs:
            order, seed = (self.setting.order, self.setting.seed) if self.serial else (ASCENDING, 0)
            uses = next_uses(self.stream, self.blocks, self.by_use, order, seed)
            self.setting = self.setting._replace(next_use=uses)

    def parts(self) -> list[range]:
        """The runs, in the pieces that share a cache: all of them, or those of each group when it is fresh."""
        if self.settings.sequences == "carry":
            return [range(len(self.feed.bins))]
        bounds = [*np.flatnonzero(self.feed.starts).tolist(), len(self.feed.bins)]
        return [range(begin, end) for begin, end in pairwise(bounds)]

    def begin(self, compiled: bool) -> Callable[[int], None]:
        """An empty cache and a new policy; returns what replays one run with them."""
        future = Upcoming(self.blocks) if "future" in self.kind.needs else None
        policy = self._policy(future)
        preloaded = list(policy.preload())
        self.loaded.extend(preloaded)
        return self._compiled(policy, preloaded) if compiled else self._by_object(policy, future, preloaded)

    def _policy(self, future: Upcoming | None) -> EvictionPolicy:
        """A new policy object; raises :class:`InputError` for an option that it does not take."""
        try:
            return self.kind(PolicyContext(**{**vars(self.context), "future": future}))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.settings.policy}: {error}") from error

    def compile(self) -> None:
        """Replays nothing, so that the kernel is compiled or read from disk."""
        self.look_ahead_nothing()
        started = time.perf_counter()
        self._policy(Upcoming(self.blocks))  # what is learned is kept, and counts
        self.learning_s = time.perf_counter() - started
        self.begin(compiled=True)
        self._kernel(*self.last, self.stream, self.setting, self.out, 0, 0)
        self.loaded.clear()

    def look_ahead_nothing(self) -> None:
        """Compiles the search for next uses, on no passes."""
        if "future" in self.kind.needs:
            next_uses(self.stream._replace(runs=np.zeros(1, np.int64)), self.blocks, self.serial, 0, 0)

    @property
    def _kernel(self) -> Any:
        if self.feed.single and self.alike and len(set(self.context.weights)) == 1:
            return single.replay_single
        return kernel.replay_serial if self.by_use else kernel.replay_atomic

    def _compiled(self, policy: EvictionPolicy, preloaded: Sequence[int]) -> Callable[[int], None]:
        state = TWINS[self.kind].build(policy)
        cache = empty_cache(self.blocks, self.layers, self.shared)
        if self.last is not None:
            cache.clock[:] = self.last[1].clock
        book.preload(state, cache, self.stream, np.array(preloaded, np.int64))
        self.last = state, cache

        def run(index: int) -> None:
            self._kernel(state, cache, self.stream, self.setting, self.out, index, index + 1)

        return run

    def _by_object(
        self, policy: EvictionPolicy, future: Upcoming | None, preloaded: Sequence[int]
    ) -> Callable[[int], None]:
        pools = 1 if self.shared else self.layers
        one = ObjectReplay(policy, future or Upcoming(self.blocks), self.stream, self.setting, self.out, pools=pools)
        one.preload(preloaded)
        if self.last is not None:
            one.uses, one.entries = self.last.uses, self.last.entries
        self.last = one
        return lambda index: one.run(index, index + 1, serial=self.by_use)

    def result(self, seconds: float) -> Replay:
        """What was found."""
        sizes = self.feed.trace.header.expert_bytes
        experts = self.context.experts
        return Replay(
            settings=self.settings,
            feed=self.feed,
            table=self.out.table,
            histogram=self.out.histogram,
            loads=self.out.loads,
            static_blocks=len(self.loaded),
            static_load_bytes=sum(sizes[block // experts] for block in self.loaded),
            seconds=seconds,
            log=self.out.log[self.out.log[:, 0] >= 0],
        )


def stream_of(feed: Feed, weights: Sequence[int], *, scored: bool) -> Stream:
    """The arrays that both ways of replaying read; ``weights`` are those of a block, by layer."""
    header, trace = feed.trace.header, feed.trace
    per_layer = np.array([weights, header.expert_bytes], np.int64)
    return Stream(
        ids=_frozen(trace.expert_ids),
        rows=feed.rows,
        offsets=feed.offsets,
        runs=feed.runs,
        bins=feed.bins,
        starts=feed.starts,
        scores=_bits(trace.scores if scored else None, header.experts),
        gates=_bits(trace.gates if scored else None, header.top_k),
        halves=_HALVES,
        weights=np.repeat(per_layer[0], header.experts),
        bytes=np.repeat(per_layer[1], header.experts),
    )


def _frozen(array: Array) -> Array:
    """A read-only, contiguous view: numba compiles anew for every other kind of array."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _bits(weights: Array | None, width: int) -> Array:
    """The bits of float16 ``weights`` [T, L, width]; numba knows no half-precision numbers."""
    return _frozen(np.empty((0, 1, width), np.uint16) if weights is None else np.asarray(weights).view(np.uint16))
