"""The forward passes of a run: golden cases, and a slow model that says the same."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import InputError
from traces.schedule import Schedule, by_sequence, schedule
from traces.schema import Trace, TraceHeader

P, D = 0, 1

Row = tuple[int, int, int]
"""Sequence, phase, forward pass that it was recorded in."""

CHUNKED: list[Row] = [(0, P, 0), (0, P, 0), (0, P, 1), (0, D, 2), (0, D, 3), (1, P, 4), (1, D, 5)]
"""A prompt of three tokens in two chunks, and a prompt of one."""

TOGETHER: list[Row] = [(7, P, 0), (7, P, 0), (3, P, 0), (7, D, 1), (3, D, 1), (7, D, 2)]
"""Two requests that were recorded in lock-step; 7 came first."""


def trace_of(rows: list[Row]) -> Trace:
    """One layer, one expert; positions count up within each sequence."""
    seen: dict[int, int] = {}
    position = []
    for sequence, _, _ in rows:
        position.append(seen.get(sequence, 0))
        seen[sequence] = position[-1] + 1
    return Trace.of(
        TraceHeader(model="by hand", layers=1, experts=1, top_k=1, expert_bytes=(1,)),
        expert_ids=np.zeros((len(rows), 1, 1)),
        token_ids=np.zeros(len(rows)),
        position=position,
        **dict(zip(("sequence", "phase", "step"), zip(*rows, strict=True), strict=True)),
    )


def passes(plan: Schedule) -> list[list[int]]:
    return [rows.tolist() for rows in np.split(plan.rows, plan.offsets[1:-1])]


@pytest.mark.parametrize(
    ("rows", "batch", "whole", "expected", "group", "phase"),
    [
        (CHUNKED, 1, False, [[0, 1], [2], [3], [4], [5], [6]], [0, 0, 0, 0, 1, 1], [P, P, D, D, P, D]),
        (CHUNKED, 1, True, [[0, 1, 2], [3], [4], [5], [6]], [0, 0, 0, 1, 1], [P, D, D, P, D]),
        # the shorter prompt waits for the second chunk of the longer one; the lane that has ended idles
        (CHUNKED, 2, False, [[0, 1, 5], [2], [3, 6], [4]], [0, 0, 0, 0], [P, P, D, D]),
        (CHUNKED, 2, True, [[0, 1, 2, 5], [3, 6], [4]], [0, 0, 0], [P, D, D]),
        (CHUNKED, 9, True, [[0, 1, 2, 5], [3, 6], [4]], [0, 0, 0], [P, D, D]),
        (TOGETHER, 1, False, [[0, 1], [3], [5], [2], [4]], [0, 0, 0, 1, 1], [P, D, D, P, D]),
        (TOGETHER, 2, False, [[0, 1, 2], [3, 4], [5]], [0, 0, 0], [P, D, D]),
    ],
)
def test_golden(
    rows: list[Row], batch: int, whole: bool, expected: list[list[int]], group: list[int], phase: list[int]
) -> None:
    plan = schedule(trace_of(rows), batch, whole_prompts=whole)
    assert passes(plan) == expected
    assert plan.group.tolist() == group
    assert plan.phase.tolist() == phase
    assert (len(plan), plan.groups, plan.batch) == (len(expected), group[-1] + 1, batch)


def test_tokens_of_decode_never_share_a_pass_with_their_own_sequence() -> None:
    """Whatever the recording says, a token depends on the one before it."""
    plan = schedule(trace_of([(0, P, 0), (0, D, 0), (0, D, 0)]), whole_prompts=False)
    assert passes(plan) == [[0], [1], [2]]


def test_rows_by_sequence_in_the_order_of_first_appearance() -> None:
    order = by_sequence(trace_of(TOGETHER))
    assert order.rows.tolist() == [0, 1, 3, 5, 2, 4]
    assert order.starts.tolist() == [0, 4]
    assert order.lane_of().tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("batch", [0, -1, 65_537, 10**23])
def test_a_batch_has_a_lane(batch: int) -> None:
    with pytest.raises(InputError, match=f"batch must be from 1 to 65536, got {batch}"):
        schedule(trace_of(CHUNKED), batch, whole_prompts=True)


@st.composite
def recordings(draw: st.DrawFn) -> Trace:
    """Up to five sequences of any lengths, shuffled together; neighbouring prompt rows may share a pass."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5))
    lengths = [(prompt, new) if prompt + new else (1, 0) for prompt, new in lengths]
    order = draw(st.permutations([lane for lane, (prompt, new) in enumerate(lengths) for _ in range(prompt + new)]))
    new_pass = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
    seen = [0] * len(lengths)
    rows: list[Row] = []
    for lane, step in zip(order, np.cumsum(new_pass).tolist(), strict=True):
        rows.append((lane, P if seen[lane] < lengths[lane][0] else D, step))
        seen[lane] += 1
    return trace_of(rows)


def slowly(trace: Trace, batch: int, whole: bool) -> list[tuple[int, list[int]]]:
    """(group, rows) of every pass, lane by lane."""
    lanes: dict[int, list[int]] = {}
    for row, sequence in enumerate(trace.sequence.tolist()):
        lanes.setdefault(sequence, []).append(row)
    order, out = [*lanes.values()], []
    for first in range(0, len(order), batch):
        for phase in (P, D):
            cut = [pieces(trace, lane, phase, whole) for lane in order[first : first + batch]]
            out += [(first // batch, [*chain(*together)]) for together in zip_longest(*cut, fillvalue=[])]
    return out


def pieces(trace: Trace, lane: list[int], phase: int, whole: bool) -> list[list[int]]:
    """The passes of one lane in one phase."""
    out: list[list[int]] = []
    for row in (row for row in lane if trace.phase[row] == phase):
        joins = phase == P and out and (whole or trace.step[row] == trace.step[out[-1][-1]])
        if joins:
            out[-1].append(row)
        else:
            out.append([row])
    return out


@given(recordings(), st.integers(1, 6), st.booleans())
def test_the_passes_are_those_of_the_slow_model(trace: Trace, batch: int, whole: bool) -> None:
    plan: Any = schedule(trace, batch, whole_prompts=whole)
    assert [*zip(plan.group.tolist(), passes(plan), strict=True)] == slowly(trace, batch, whole)
    assert (plan.rows.dtype, plan.offsets.dtype, plan.group.dtype) == (np.int64, np.int64, np.int32)
