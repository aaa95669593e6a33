"""A trace as a replay reads it: its passes in order, cut into runs whose counts go to one row of the table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from traces.errors import InputError
from traces.schedule import Schedule, schedule
from traces.schema import NOT_ROUTED, Array, Trace

MOST_PASSES = 1 << 20
"""Passes of the longest run, so that a replay can report how far it is."""


@dataclass(frozen=True, eq=False)
class Feed:
    """The passes of a trace. Row 2 * g + p of a table of counts is for group g in phase p; passes that only warm the
    cache up have the row after the last. S passes, R runs."""

    trace: Trace
    plan: Schedule
    warmup_steps: int
    runs: Array  # int64 [R + 1], bounds in passes
    bins: Array  # int64 [R]
    starts: Array  # uint8 [R]

    @classmethod
    def of(cls, trace: Trace, batch: int = 1, warmup_steps: int = 0) -> Feed:
        """The passes as the trace has them (a prompt in the chunks that it was recorded in), over ``batch`` lanes.

        The first ``warmup_steps`` passes are replayed and not counted. Raises :class:`InputError` when none is left.
        """
        plan = schedule(trace, batch, whole_prompts=False)
        if not 0 <= warmup_steps < len(plan):
            raise InputError(f"warmup must be between 0 and {len(plan) - 1} of {len(plan)} passes, got {warmup_steps}")
        bins = 2 * plan.group.astype(np.int64) + plan.phase
        group_begins = np.flatnonzero(np.diff(plan.group, prepend=-1))
        changes = np.flatnonzero(np.diff(bins, prepend=-1))
        pieces = np.arange(0, len(plan), MOST_PASSES)
        runs: Array = np.unique(np.concatenate([changes, pieces, np.array([warmup_steps, len(plan)])]))
        first = runs[:-1]
        starts = np.isin(first, group_begins, assume_unique=True).astype(np.uint8)
        return cls(
            trace, plan, warmup_steps, runs, np.where(first < warmup_steps, 2 * plan.groups, bins[first]), starts
        )

    @cached_property
    def single(self) -> bool:
        """Whether every pass is one token, and every token has one expert a layer."""
        return self.trace.header.top_k == 1 and len(self.plan) == len(self.trace)

    @cached_property
    def rows(self) -> Array:
        """Rows of the trace in the order of the run, int64 [T]; empty when they stand in it."""
        rows = self.plan.rows
        in_order = len(rows) == 0 or bool((rows[1:] > rows[:-1]).all())
        return np.empty(0, np.int64) if in_order else rows

    @cached_property
    def offsets(self) -> Array:
        """Bounds of the passes in ``rows``, int64 [S + 1]; empty when each has one."""
        return np.empty(0, np.int64) if len(self.plan) == len(self.trace) else self.plan.offsets

    @cached_property
    def assignments(self) -> int:
        """Pairs of token and expert."""
        ids = self.trace.expert_ids
        chunk = max(1, 1 << 22 // max(1, ids[0].size))
        return sum(int(np.count_nonzero(ids[at : at + chunk] != NOT_ROUTED)) for at in range(0, len(ids), chunk))
