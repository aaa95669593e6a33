"""Workloads: golden step tables, laws of the routing, and the future that Belady's policy is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import NOT_ROUTED, InputError, Phase, Trace, TraceHeader
from traces.synthetic import Sizes, zipf
from traces.workload import NEVER, Routing, Workload, lock_step, next_uses, one_at_a_time, routings

P, D = Phase.PREFILL, Phase.DECODE


def trace_of(rows: list[tuple[int, int, Phase]], ids: Any = None, experts: int = 4) -> Trace:
    """A trace from rows (sequence, position, phase), each a forward pass of its own; ids [T, L, K], else all [0, 1]."""
    ids = np.asarray(ids if ids is not None else [[[0, 1]]] * len(rows))
    layers, top_k = ids.shape[1:]
    header = TraceHeader(model="hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=(1,) * layers)
    sequence, position, phase = zip(*rows, strict=True)
    return Trace.of(
        header,
        expert_ids=ids,
        token_ids=[0] * len(rows),
        sequence=sequence,
        position=position,
        phase=phase,
        step=range(len(rows)),
    )


MIXED = [(5, 0, P), (5, 1, P), (2, 0, P), (5, 2, D), (2, 1, D), (5, 3, D), (9, 6, D), (9, 7, D), (9, 8, D)]
"""Three sequences, rows of the first two interleaved: 5 (two prompt tokens, two new), 2 (one and one), and 9, which
has three decode tokens only, after six tokens that were not recorded."""


def table(workload: Workload) -> list[tuple[Any, ...]]:
    return [
        (s.index, s.phase, s.rows.tolist(), s.sequences, s.tokens, s.context, s.starts, s.ends) for s in workload.steps
    ]


ONE_AT_A_TIME = [
    (0, P, [0, 1], (5,), (2,), 2, (5,), ()),
    (1, D, [3], (5,), (1,), 3, (), ()),
    (2, D, [5], (5,), (1,), 4, (), (5,)),
    (3, P, [2], (2,), (1,), 1, (2,), ()),
    (4, D, [4], (2,), (1,), 2, (), (2,)),
    (5, D, [6], (9,), (1,), 7, (9,), ()),
    (6, D, [7], (9,), (1,), 8, (), ()),
    (7, D, [8], (9,), (1,), 9, (), (9,)),
]


def test_one_at_a_time_golden() -> None:
    assert table(one_at_a_time(trace_of(MIXED))) == ONE_AT_A_TIME


def test_lock_step_of_one_lane_is_one_at_a_time() -> None:
    assert table(lock_step(trace_of(MIXED), 1)) == ONE_AT_A_TIME


def test_lock_step_golden() -> None:
    assert table(lock_step(trace_of(MIXED), 2)) == [
        (0, P, [0, 1, 2], (5, 2), (2, 1), 2, (5, 2), ()),
        (1, D, [3, 4], (5, 2), (1, 1), 3, (), (2,)),
        (2, D, [5], (5,), (1,), 4, (), (5,)),
        (3, D, [6], (9,), (1,), 7, (9,), ()),
        (4, D, [7], (9,), (1,), 8, (), ()),
        (5, D, [8], (9,), (1,), 9, (), (9,)),
    ]


def test_a_lane_without_a_prompt_waits_for_the_others_prefill() -> None:
    assert table(lock_step(trace_of(MIXED), 3)) == [
        (0, P, [0, 1, 2], (5, 2), (2, 1), 6, (5, 2), ()),
        (1, D, [3, 4, 6], (5, 2, 9), (1, 1, 1), 7, (9,), (2,)),
        (2, D, [5, 7], (5, 9), (1, 1), 8, (), (5,)),
        (3, D, [8], (9,), (1,), 9, (), (9,)),
    ]


def test_a_prompt_alone_starts_and_ends_in_one_step_and_its_cache_stays() -> None:
    rows = [(0, 0, P), (0, 1, P), (0, 2, P), (1, 0, P), (1, 1, D)]
    assert table(lock_step(trace_of(rows), 2)) == [
        (0, P, [0, 1, 2, 3], (0, 1), (3, 1), 3, (0, 1), (0,)),
        (1, D, [4], (1,), (1,), 3, (), (1,)),
    ]


def test_batch_must_be_positive() -> None:
    with pytest.raises(InputError, match="batch must be from 1 to 65536, got 0"):
        lock_step(trace_of(MIXED), 0)


def test_describe_counts() -> None:
    assert lock_step(trace_of(MIXED), 2).describe() == {
        "order": "lock-step",
        "batch": 2,
        "sequences": 3,
        "prefill_steps": 1,
        "decode_steps": 5,
        "prompt_tokens": 3,
        "new_tokens": 6,
    }
    assert one_at_a_time(trace_of(MIXED)).describe()["order"] == "one-at-a-time"
    assert len(one_at_a_time(trace_of(MIXED))) == 8


@st.composite
def traces_of_any_shape(draw: st.DrawFn) -> Trace:
    """Up to four sequences with any lengths, their rows shuffled together, and some tokens not routed."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4))
    lengths = [(prompt, new) if prompt + new else (1, 0) for prompt, new in lengths]
    order = draw(st.permutations([lane for lane, (prompt, new) in enumerate(lengths) for _ in range(prompt + new)]))
    seen = [0] * len(lengths)
    rows = []
    for lane in order:
        rows.append((lane, seen[lane], P if seen[lane] < lengths[lane][0] else D))
        seen[lane] += 1
    experts = draw(st.integers(3, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    ids = rng.permuted(np.tile(np.arange(experts), (len(rows), 2, 1)), axis=-1)[..., :3]
    ids[rng.random(ids.shape) < 0.2] = NOT_ROUTED
    return trace_of(rows, ids, experts)


@given(traces_of_any_shape(), st.integers(1, 5))
def test_every_row_is_computed_once_in_order_of_its_sequence(trace: Trace, batch: int) -> None:
    workload = lock_step(trace, batch)
    rows = np.concatenate([step.rows for step in workload])
    assert sorted(rows.tolist()) == list(range(len(trace)))
    for sequence in set(trace.sequence.tolist()):
        assert (np.diff(trace.position[rows[trace.sequence[rows] == sequence]]) == 1).all()
    everyone = sorted(set(trace.sequence.tolist()))
    assert sorted(s for step in workload for s in step.starts) == everyone
    assert sorted(s for step in workload for s in step.ends) == everyone
    for index, step in enumerate(workload):
        assert step.index == index
        assert step.rows.dtype == np.int64
        assert set(trace.phase[step.rows].tolist()) == {step.phase}
        assert trace.sequence[step.rows].tolist() == np.repeat(step.sequences, step.tokens).tolist()
        assert len(step.sequences) <= batch


def naive_routing(trace: Trace, rows: list[int], layer: int) -> Routing:
    chosen = [int(e) for row in rows for e in trace.expert_ids[row, layer] if e != NOT_ROUTED]
    union = sorted(set(chosen))
    return Routing(tuple(union), tuple(chosen.count(e) for e in union), len(chosen))


@given(traces_of_any_shape(), st.integers(1, 5))
def test_routings_are_the_union_and_its_counts(trace: Trace, batch: int) -> None:
    for step in lock_step(trace, batch):
        expected = [naive_routing(trace, step.rows.tolist(), layer) for layer in range(trace.header.layers)]
        assert routings(trace, step) == expected


def test_routing_golden() -> None:
    ids = [[[2, 0], [3, 1]], [[0, NOT_ROUTED], [1, 3]], [[NOT_ROUTED, NOT_ROUTED], [3, 0]]]
    trace = trace_of([(0, 0, P), (0, 1, P), (0, 2, D)], ids)
    prefill, decode = one_at_a_time(trace)
    assert routings(trace, prefill) == [Routing((0, 2), (2, 1), 3), Routing((1, 3), (2, 2), 4)]
    assert routings(trace, decode) == [Routing((), (), 0), Routing((0, 3), (1, 1), 2)]
    assert all(type(expert) is int for routing in routings(trace, prefill) for expert in routing.experts)


def test_next_uses_golden() -> None:
    ids = [[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[0, 1], [3, 1]]]
    future = next_uses(one_at_a_time(trace_of([(0, 0, P), (0, 1, D), (0, 2, D)], ids)))
    assert future.offsets.tolist() == [0, 3, 5, 6, 6, 6, 7, 9, 12]
    assert future.events.tolist() == [0, 2, 4, 0, 4, 2, 5, 1, 3, 1, 3, 5]
    assert [future.next_use(0, event) for event in (-1, 0, 1, 2, 4)] == [0, 2, 2, 4, NEVER]
    assert future.next_use(3, -1) == NEVER
    future.reset()
    assert future.next_use(0, -1) == 0


@given(
    traces_of_any_shape(),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(-1, 40)), max_size=60),
)
def test_next_use_is_right_in_any_order_of_questions(
    trace: Trace, batch: int, questions: list[tuple[int, int]]
) -> None:
    workload = lock_step(trace, batch)
    layers, experts = trace.header.layers, trace.header.experts
    uses: dict[int, list[int]] = {}
    for step in workload:
        for layer, routing in enumerate(routings(trace, step)):
            for expert in routing.experts:
                uses.setdefault(layer * experts + expert, []).append(step.index * layers + layer)
    future = next_uses(workload)
    for number, event in questions:
        block = number % (layers * experts)
        assert future.next_use(block, event) == min((e for e in uses.get(block, []) if e > event), default=NEVER)


def test_a_synthetic_trace_runs_in_the_passes_that_it_was_made_in() -> None:
    trace = zipf(np.random.default_rng(0), Sizes(sequences=3, prompt_tokens=4, new_tokens=5))
    for step in one_at_a_time(trace):
        assert set(trace.step[step.rows].tolist()) == {step.index}
