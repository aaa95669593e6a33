"""Hits at every capacity: from one pass over the trace for ``lru`` and ``belady``, else replayed at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd

from sim.compiled import curves as compiled
from sim.compiled.stream import ASCENDING, Stream
from sim.policies.base import Calibration, EvictionPolicy
from sim.replay.feed import Feed
from sim.replay.result import PHASES, Replay
from sim.replay.run import replay, stream_of
from sim.replay.settings import ORDERS, Capacity, Contract, Scope, Sequences, Settings, UseOrder
from traces.errors import InputError
from traces.schema import Array, TraceHeader

ONE_PASS = ("lru", "belady")
"""Policies whose hits at all capacities come from one pass."""

POINTS = 256
"""Capacities in bytes that are looked at where none are named."""

HEURISTIC = (
    "experts of unequal bytes share the pool: no single order serves all capacities then, and the curve is a heuristic"
)

COLUMNS = (
    "policy",
    "scope",
    "contract",
    "phase",
    "capacity_slots",
    "capacity_share",
    "capacity_bytes",
    "hit_ratio_assignments",
    "hit_ratio_union",
    "exact",
)
"""Columns of a frame of curves, or of points beside them."""

WHOLE = {"capacity_slots": "Int64", "capacity_bytes": "Int64"}
"""Types of the columns of whole numbers that may be missing."""

Progress = Callable[[int], None]
"""Is told how many passes were measured."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The hits of one policy at C capacities; the first axis of a table is the phase. Warm-up is left out.

    ``exact`` is True when the counts are those of a replay at each capacity; ``note`` says why where they are not.
    """

    policy: str
    scope: Scope
    contract: Contract
    order: UseOrder
    sequences: Sequences
    seed: int
    unit: Literal["slots", "bytes"]
    header: TraceHeader
    capacities: Array  # int64 [C], rising; of a pool, in ``unit``
    hits_assignments: Array  # int64 [2, C]
    hits_union: Array  # int64 [2, C]
    assignments: Array  # int64 [2]
    accesses: Array  # int64 [2]
    exact: bool
    note: str = ""

    def hit_ratios(self, phase: str = "all", by: Literal["assignments", "union"] = "assignments") -> Array:
        """Share of the assignments, or of the distinct experts of all events, that hit: float64 [C].

        Raises :class:`InputError` when the trace has nothing of ``phase``.
        """
        if phase not in PHASES:
            raise InputError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        rows = list(PHASES[phase])
        hits, uses = (self.hits_union, self.accesses) if by == "union" else (self.hits_assignments, self.assignments)
        if not uses[rows].sum():
            raise InputError(f"phase must be one that the trace has, got {phase}")
        ratios: Array = hits[rows].sum(axis=0) / uses[rows].sum()
        return ratios

    def shares(self) -> Array:
        """The capacities as shares of all experts, in slots or in bytes: float64 [C]."""
        whole = self.header.experts * sum(_weights(self.header, self.unit))
        shares: Array = self.capacities * _pools(self.header, self.scope) / whole
        return shares

    def frame(self, phase: str = "all") -> pd.DataFrame:
        """One row a capacity, of the whole cache: the columns of :func:`points`, ready for ``analysis.plots_cache``."""
        amounts: Any = self.capacities * _pools(self.header, self.scope)
        columns = {
            "policy": self.policy,
            "scope": self.scope,
            "contract": self.contract,
            "phase": phase,
            "capacity_slots": amounts if self.unit == "slots" else None,
            "capacity_share": self.shares(),
            "capacity_bytes": self._bytes(amounts) if self.header.sized else None,
            "hit_ratio_assignments": self.hit_ratios(phase),
            "hit_ratio_union": self.hit_ratios(phase, "union"),
            "exact": self.exact,
        }
        return pd.DataFrame(columns, columns=list(COLUMNS)).astype(WHOLE)

    def _bytes(self, amounts: Array) -> Array | None:
        """Of the whole cache; None for one pool whose experts differ in size."""
        sizes = self.header.expert_bytes
        if self.unit == "bytes":
            return amounts
        if self.scope == "layer":
            return self.capacities * sum(sizes)
        return self.capacities * sizes[0] if len(set(sizes)) == 1 else None

    def knee(
        self, gain: float | None = None, phase: str = "all", by: Literal["assignments", "union"] = "assignments"
    ) -> int:
        """The place in ``capacities`` beyond which slots gain, on average, less than ``gain`` of the hit ratio each.

        A slot is one more in every layer; by default ``gain`` is an even share, 1 / E. Where the curve bends one way
        only, this is the first capacity at which another slot gains less; a step up behind a flat part is not missed.
        """
        each = 1 / self.header.experts if gain is None else gain
        slots = self.shares() * self.header.experts
        return int(np.argmax(self.hit_ratios(phase, by) - each * slots))


def curve(
    feed: Feed,
    policy: str = "lru",
    *,
    scope: Scope = "layer",
    contract: Contract = "atomic",
    order: UseOrder = "as-routed",
    sequences: Sequences = "carry",
    seed: int = 0,
    unit: Literal["slots", "bytes"] = "slots",
    capacities: Sequence[int] | None = None,
    progress: Progress = lambda passes: None,
) -> Curve:
    """The hits of ``lru`` or ``belady`` (with bypass) at all capacities of a pool, from one pass over ``feed``.

    ``capacities`` are of a pool: by default every number of slots, or :data:`POINTS` of bytes at even distances. They
    equal the hits of :func:`sim.replay.replay` at each, but for ``belady`` where experts of unequal bytes share a pool.
    Source: the stacks of Mattson, Gecsei, Slutz and Traiger, IBM Systems Journal 9(2), 1970; departures: an event of
    several blocks is measured as a whole under the atomic contract, distances may be in bytes, and ``belady`` need not
    keep what was used last. Raises :class:`InputError` for another policy, and for a capacity that no cache can have.
    """
    if policy not in ONE_PASS:
        raise InputError(f"policy must be {' or '.join(ONE_PASS)} to have a curve from one pass, got {policy!r}")
    header, serial = feed.trace.header, contract == "serial"
    wanted = _capacities(header, scope, unit, capacities)
    stream = stream_of(feed, _weights(header, unit), scored=False)
    stream = stream._replace(bins=np.where(stream.bins == 2 * feed.plan.groups, 2, stream.bins & 1))
    manner = compiled.Manner(scope == "global", serial, ORDERS.index(order) if serial else ASCENDING, seed)
    every_slot = unit == "slots" and capacities is None
    tally = compiled.Tally(
        union=np.zeros((3, len(wanted) + 2), np.int64),
        assignments=np.zeros((3, len(wanted) + 2), np.int64),
        capacities=np.empty(0, np.int64) if every_slot else wanted,
    )
    heuristic = _measure(feed, policy, stream, manner, tally, sequences == "fresh", progress)
    return Curve(
        policy=policy,
        scope=scope,
        contract=contract,
        order=order,
        sequences=sequences,
        seed=seed,
        unit=unit,
        header=header,
        capacities=wanted,
        hits_assignments=tally.assignments[:2, 1:-1].cumsum(axis=1),
        hits_union=tally.union[:2, 1:-1].cumsum(axis=1),
        assignments=tally.assignments[:2].sum(axis=1),
        accesses=tally.union[:2].sum(axis=1),
        exact=not heuristic,
        note=HEURISTIC if heuristic else "",
    )


def _measure(
    feed: Feed,
    policy: str,
    stream: Stream,
    manner: compiled.Manner,
    tally: compiled.Tally,
    fresh: bool,
    progress: Progress,
) -> bool:
    """Fills ``tally``; returns whether what it holds is a heuristic."""
    experts, pools = feed.trace.header.experts, 1 if manner.shared else feed.trace.header.layers
    upcoming = compiled.upcoming_keys(stream, len(stream.weights), manner) if policy == "belady" else None
    desk = compiled.Desk(np.empty(experts, np.int64), np.zeros(experts, np.int64), np.zeros(1, np.int64))
    starts = np.flatnonzero(feed.starts).tolist() if fresh else [0]
    for begin, end in pairwise([*starts, len(feed.bins)]):
        stack = (
            compiled.recent_first(stream.weights, pools)
            if upcoming is None
            else compiled.needed_first(stream.weights, pools, upcoming)
        )
        for run in range(begin, end):
            compiled.measure_runs(stack, stream, desk, tally, manner, run, run + 1)
            progress(int(feed.runs[run + 1] - feed.runs[run]))
    return isinstance(stack, compiled.NeededFirstBytes)


def sampled(
    feed: Feed,
    settings: Settings,
    capacities: Sequence[Capacity],
    *,
    policy: type[EvictionPolicy] | None = None,
    calibration: Calibration | None = None,
    progress: Progress = lambda passes: None,
) -> list[Replay]:
    """Replays ``feed`` at each of ``capacities``, for policies that have no curve; what ``settings`` holds is not used.

    The other arguments are those of :func:`sim.replay.replay`.
    """
    return [
        replay(feed, replace(settings, capacity=capacity), policy=policy, calibration=calibration, progress=progress)
        for capacity in capacities
    ]


def points(replays: Sequence[Replay], phase: str = "all") -> pd.DataFrame:
    """One row a replay, with the columns of :meth:`Curve.frame`, so that one plot can hold both.

    ``capacity_slots`` and ``capacity_bytes`` are of the whole cache, missing where they are not known;
    ``capacity_share`` is its share of all experts.
    """
    rows = [replay.row(phase) | {"capacity_share": _share(replay), "exact": True} for replay in replays]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(WHOLE)


def _share(found: Replay) -> float:
    settings, header = found.settings, found.feed.trace.header
    whole = header.experts * sum(_weights(header, settings.capacity.unit))
    return settings.capacity.amount * _pools(header, settings.scope) / whole


def _weights(header: TraceHeader, unit: str) -> tuple[int, ...]:
    """What a block takes of its pool, by layer."""
    return header.expert_bytes if unit == "bytes" else (1,) * header.layers


def _pools(header: TraceHeader, scope: Scope) -> int:
    return 1 if scope == "global" else header.layers


def _capacities(header: TraceHeader, scope: Scope, unit: str, wanted: Sequence[int] | None) -> Array:
    """The capacities of a pool, rising; raises :class:`InputError` for one that holds nothing, or more than all."""
    weights = _weights(header, unit)
    if not min(weights):
        raise InputError(f"expert_bytes must be above 0 for capacities in bytes, got 0 in layer {weights.index(0)}")
    least, most = max(weights), header.experts * sum(weights) // _pools(header, scope)
    if wanted is None:
        wanted = np.linspace(least, most, most if unit == "slots" else POINTS).astype(np.int64).tolist()
    if not len(wanted):
        raise InputError("capacities must name at least one, got none")
    for amount in wanted:
        if not least <= amount <= most:
            raise InputError(f"capacity must be between {least} and {most} {unit} of a pool, got {amount}")
    return np.unique(np.asarray(wanted, np.int64))
