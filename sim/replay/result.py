"""What a replay found: counts by group and phase, and the row of the table that a person reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.compiled.counts import COLUMNS
from sim.replay.feed import Feed
from sim.replay.settings import Settings
from traces.errors import InputError
from traces.schema import Array, Phase, TraceHeader

PHASES: dict[str, tuple[int, ...]] = {
    "all": (Phase.PREFILL, Phase.DECODE),
    "prefill": (Phase.PREFILL,),
    "decode": (Phase.DECODE,),
}
"""Names of what is counted together."""


@dataclass(frozen=True, eq=False)
class Replay:
    """The outcome of one replay. G groups (a sequence each, or a lock-step batch)."""

    settings: Settings
    feed: Feed
    table: Array  # int64 [2 * G + 1, columns], as counts.COLUMNS; the last row is the warm-up
    histogram: Array  # int64 [2, L * E + 1], passes by phase and number of misses
    loads: Array  # int64 [S], bytes loaded in a pass; empty where all experts have the same bytes
    static_blocks: int  # loaded before the first pass
    static_load_bytes: int
    seconds: float
    log: Array  # int64 [n, 3]: decision, block, 0 for left or 1 for used without being kept; may be empty

    def groups(self, phase: str = "all") -> dict[str, Array]:
        """The counts by group, int64 [G] each."""
        table = self.table[:-1].reshape(-1, 2, len(COLUMNS))[:, list(_phase(phase))].sum(axis=1)
        return dict(zip(COLUMNS, table.T, strict=True))

    def misses_quantile(self, q: float, phase: str = "all") -> int:
        """The smallest number of misses that a share ``q`` of the passes does not exceed."""
        passes = self.histogram[list(_phase(phase))].sum(axis=0)
        return int(np.searchsorted(np.cumsum(passes), q * passes.sum()))

    def bytes_quantile(self, q: float, phase: str = "all") -> int:
        """The same of the bytes that a pass loads."""
        if not self.loads.size:
            return self.misses_quantile(q, phase) * self.feed.trace.header.expert_bytes[0]
        first = self.feed.warmup_steps
        loads = np.sort(self.loads[first:][np.isin(self.feed.plan.phase[first:], _phase(phase))])
        return int(loads[max(math.ceil(q * len(loads)) - 1, 0)])

    def row(self, phase: str = "all") -> dict[str, Any]:
        """The replay in one row, ready for JSON; bytes are None where the trace does not know those of its experts.

        Raises :class:`InputError` when the trace has nothing of ``phase``.
        """
        counts = {name: int(values.sum()) for name, values in self.groups(phase).items()}
        if not counts["events"]:
            raise InputError(f"phase must be one that the trace has, got {phase}")
        settings, header = self.settings, self.feed.trace.header
        pools = 1 if settings.scope == "global" else header.layers
        misses = counts["accesses"] - counts["hits"]
        by_bytes = settings.capacity.unit == "bytes"
        amount = pools * settings.capacity.amount
        row = {
            "policy": settings.policy,
            "scope": settings.scope,
            "contract": settings.contract,
            "phase": phase,
            "capacity": settings.capacity.label,
            "capacity_slots": None if by_bytes else amount,
            "capacity_bytes": amount if by_bytes else _slots_bytes(header, pools, settings.capacity.amount),
            "assignments": counts["assignments"],
            "union_accesses": counts["accesses"],
            "hits_assignments": counts["hit_assignments"],
            "hits_union": counts["hits"],
            "misses_union": misses,
            "compulsory_misses": counts["compulsory"],
            "capacity_misses": misses - counts["compulsory"] - counts["collisions"],
            "collision_misses": counts["collisions"],
            "evictions": counts["evictions"],
            "bytes_loaded": counts["bytes"],
            "static_load_bytes": self.static_load_bytes,
            "order": settings.order if settings.contract == "serial" else "at-once",
            "sequences": settings.sequences,
            "batch": self.feed.plan.batch,
            "warmup_steps": self.feed.warmup_steps,
            "seed": settings.seed,
            "options": dict(settings.options),
            "trace_digest": self.feed.trace.digest,
            "hit_ratio_assignments": counts["hit_assignments"] / counts["assignments"],
            "hit_ratio_union": counts["hits"] / counts["accesses"],
            "regime_mean": counts["load"] / counts["events"] / (settings.capacity.amount * pools / header.layers),
            "regime_above_one": counts["crowded"] / counts["events"],
            "misses_a_step_p50": self.misses_quantile(0.5, phase),
            "misses_a_step_p95": self.misses_quantile(0.95, phase),
            "misses_a_step_p99": self.misses_quantile(0.99, phase),
            "misses_a_step_max": self.misses_quantile(1.0, phase),
            "bytes_a_step_p50": self.bytes_quantile(0.5, phase),
            "bytes_a_step_p95": self.bytes_quantile(0.95, phase),
            "bytes_a_step_p99": self.bytes_quantile(0.99, phase),
            "bytes_a_step_max": self.bytes_quantile(1.0, phase),
            "seconds": self.seconds,
            "accesses_per_s": int(self.table[:, COLUMNS.index("accesses")].sum()) / self.seconds,
        }
        return row if header.sized else row | {name: None for name in row if "bytes" in name}


def _phase(name: str) -> tuple[int, ...]:
    if name not in PHASES:
        raise InputError(f"phase must be one of {', '.join(PHASES)}, got {name!r}")
    return PHASES[name]


def _slots_bytes(header: TraceHeader, pools: int, slots: int) -> int | None:
    """Bytes of ``slots`` in every pool; None for one pool whose experts differ in size."""
    if pools > 1:
        return slots * sum(header.expert_bytes)
    return slots * header.expert_bytes[0] if len(set(header.expert_bytes)) == 1 else None
