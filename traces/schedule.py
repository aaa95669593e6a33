"""The forward passes of a run as arrays: which rows of a trace meet in which pass, and in which order.

Shapes: T tokens (rows of the trace), S forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from traces.errors import InputError
from traces.limits import MOST_BATCH
from traces.schema import Array, Phase, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """The rows of a trace by sequence: sequences in order of first appearance, each in order of position."""

    rows: Array  # int64 [T]
    starts: Array  # int64 [sequences], places in ``rows``

    def lane_of(self) -> Array:
        """The number of the sequence of each row, int64 [T]."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=len(self.rows)))


def by_sequence(trace: Trace) -> Order:
    """The order of :class:`Order`; rows that already stand in it are not sorted."""
    sequence = np.asarray(trace.sequence)
    changes = np.flatnonzero(sequence[1:] != sequence[:-1]) + 1
    starts = np.concatenate([[0], changes])
    if len(np.unique(sequence[starts])) == len(starts):
        return Order(np.arange(len(trace)), starts)
    rows = np.argsort(sequence, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(sequence[rows])) + 1])
    pieces = np.split(rows, starts[1:])
    appearance = np.argsort(rows[starts])
    lengths = np.array([len(piece) for piece in pieces])[appearance]
    return Order(np.concatenate([pieces[place] for place in appearance]), np.cumsum(lengths) - lengths)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The passes of a run. Pass s computes ``rows[offsets[s] : offsets[s + 1]]``, grouped by lane, then by position.

    A *group* is what runs together from beginning to end: one sequence, or one lock-step batch of them.
    """

    trace: Trace
    batch: int
    rows: Array  # int64 [T]
    offsets: Array  # int64 [S + 1]
    group: Array  # int32 [S], not decreasing

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def phase(self) -> Array:
        """The phase of each pass, uint8 [S]."""
        phases: Array = np.asarray(self.trace.phase)[self.rows[self.offsets[:-1]]]
        return phases

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.group[-1]) + 1


def schedule(trace: Trace, batch: int = 1, *, whole_prompts: bool) -> Schedule:
    """The passes of ``trace`` over ``batch`` lanes in lock-step; one sequence after the other when it is 1.

    A lane takes its prompt in one pass when ``whole_prompts``, else in those that the trace's ``step`` tells apart
    (chunks, or single tokens), and then one token a pass. The n-th pass of all lanes of a batch is one pass, prompts
    before tokens. A lane that has ended idles until all have, and only then the next batch begins. Raises
    :class:`InputError` unless ``batch`` is from 1 to :data:`~traces.limits.MOST_BATCH`.
    """
    if not 1 <= batch <= MOST_BATCH:
        raise InputError(f"batch must be from 1 to {MOST_BATCH}, got {batch}")
    order = by_sequence(trace)
    if batch == 1:
        lane = order.lane_of()
        new = _begins_pass(trace, order, whole_prompts)
        offsets = np.concatenate([np.flatnonzero(new), [len(trace)]])
        return Schedule(trace, batch, order.rows, offsets, lane[offsets[:-1]].astype(np.int32))
    return _lock_step(trace, order, batch, whole_prompts)


def _begins_pass(trace: Trace, order: Order, whole_prompts: bool) -> Array:
    """Whether each row, in the order given, begins a pass of its lane: bool [T]."""
    new: Array = np.asarray(trace.phase)[order.rows] == Phase.DECODE
    if not whole_prompts:
        step = np.asarray(trace.step)[order.rows]
        new[1:] |= step[1:] != step[:-1]
    new[order.starts] = True
    return new


def _lock_step(trace: Trace, order: Order, batch: int, whole_prompts: bool) -> Schedule:
    lane, phase = order.lane_of(), np.asarray(trace.phase)[order.rows].astype(np.int64)
    number = np.cumsum(_begins_pass(trace, order, whole_prompts))  # of the pass, over all lanes
    part = np.ones(len(number), dtype=bool)  # begins the prompt or the decoding of a lane
    part[1:] = (lane[1:] != lane[:-1]) | (phase[1:] != phase[:-1])
    first = number[part]
    nth = number - np.repeat(first, np.diff(np.flatnonzero(part), append=len(number)))
    key = ((lane // batch) * 2 + phase) * (int(nth.max()) + 1) + nth
    places = np.argsort(key, kind="stable")
    key = key[places]
    begins = np.concatenate([[0], np.flatnonzero(np.diff(key)) + 1])
    group = (lane[places[begins]] // batch).astype(np.int32)
    return Schedule(trace, batch, order.rows[places], np.concatenate([begins, [len(key)]]), group)
