"""Lanes that are refilled, prompts in chunks, arrivals over time: golden passes, and laws of the schedulers.

In golden cases a pass reads (sequences, tokens of each, context, starts, ends, others).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.requesting import arriving, plans, play, requests_of, table
from tests.traces.routings import traces
from traces.batching import BatchSpec, InOrder, Lanes, Requests, known_order, schedule_of
from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.workload import Step, Workload, lock_step, one_at_a_time

P, D = Phase.PREFILL, Phase.DECODE

Pass = tuple[Phase, tuple[int, ...], tuple[int, ...], int, tuple[int, ...], tuple[int, ...], int]


def passes(trace: Trace, **spec: Any) -> list[Pass]:
    workload = schedule_of(trace, BatchSpec(**spec))
    assert isinstance(workload, Workload)
    return [(s.phase, s.sequences, s.tokens, s.context, s.starts, s.ends, s.others) for s in workload]


def seconds(step: Step) -> float:
    """A pass takes longer with more tokens."""
    return 1.0 + 0.1 * len(step.rows)


def test_a_lane_that_ends_is_refilled_at_the_next_step() -> None:
    assert passes(requests_of((2, 2), (1, 1), (1, 2)), batch=2, batching="continuous") == [
        (P, (0, 1), (2, 1), 2, (0, 1), (), 0),
        (D, (0, 1), (1, 1), 3, (), (1,), 0),
        (P, (2,), (1,), 1, (2,), (), 1),
        (D, (0, 2), (1, 1), 4, (), (0,), 0),
        (D, (2,), (1,), 3, (), (2,), 0),
    ]


def test_a_decode_pass_stands_between_two_chunks() -> None:
    assert passes(requests_of((1, 3), (5, 1), (2, 1)), batch=2, batching="continuous", prefill_chunk=2) == [
        (P, (0, 1), (1, 1), 1, (0, 1), (), 0),
        (D, (0,), (1,), 2, (), (), 1),
        (P, (1,), (2,), 3, (), (), 1),
        (D, (0,), (1,), 3, (), (), 1),
        (P, (1,), (2,), 5, (), (), 1),
        (D, (0, 1), (1, 1), 6, (), (0, 1), 0),
        (P, (2,), (2,), 2, (2,), (), 0),
        (D, (2,), (1,), 3, (), (2,), 0),
    ]


def test_chunks_in_lock_step_come_before_the_first_token() -> None:
    assert passes(requests_of((1, 3), (5, 1), (2, 1)), batch=2, prefill_chunk=2) == [
        (P, (0, 1), (1, 1), 1, (0, 1), (), 0),
        (P, (1,), (2,), 3, (), (), 1),
        (P, (1,), (2,), 5, (), (), 1),
        (D, (0, 1), (1, 1), 6, (), (1,), 0),
        (D, (0,), (1,), 6, (), (), 0),
        (D, (0,), (1,), 6, (), (0,), 0),
        (P, (2,), (2,), 2, (2,), (), 0),
        (D, (2,), (1,), 3, (), (2,), 0),
    ]


def test_policies_forget_when_nobody_goes_on() -> None:
    trace = requests_of((1, 3), (5, 1), (2, 1))
    workload = schedule_of(trace, BatchSpec(batch=2, batching="continuous", prefill_chunk=2))
    assert [step.new_batch for step in workload] == [True, False, False, False, False, False, True, False]
    refilled = schedule_of(requests_of((2, 2), (1, 1), (1, 2)), BatchSpec(batch=2, batching="continuous"))
    assert [step.new_batch for step in refilled] == [True, False, False, False, False]


def test_requests_without_a_prompt_join_in_a_decode_pass() -> None:
    assert passes(requests_of((0, 2), (0, 1), (0, 1)), batch=2, batching="continuous") == [
        (D, (0, 1), (1, 1), 1, (0, 1), (1,), 0),
        (D, (0, 2), (1, 1), 2, (2,), (0, 2), 0),
    ]


def test_arrivals_golden(tmp_path: Path) -> None:
    """Passes take 2 s. Request 1 comes while 0 runs and fills the second lane; 2 waits for a lane; 3 comes late."""
    spec = arriving(tmp_path, 1, 2, 2, 20, batch=2, batching="continuous")
    plan = schedule_of(requests_of((1, 2), (1, 1), (1, 1), (1, 0)), spec)
    assert isinstance(plan, Requests)
    assert [(start, step.phase, step.sequences) for start, _, step in play(plan.scheduler(), lambda _: 2.0)] == [
        (1, P, (0,)),
        (3, D, (0,)),
        (5, P, (1,)),
        (7, D, (0, 1)),
        (9, P, (2,)),
        (11, D, (2,)),
        (20, P, (3,)),
    ]


def test_a_lock_step_batch_is_who_has_arrived(tmp_path: Path) -> None:
    plan = schedule_of(requests_of((1, 1), (1, 2), (1, 1)), arriving(tmp_path, 0, 1, 1, batch=2))
    assert isinstance(plan, Requests)
    assert [(start, step.phase, step.sequences) for start, _, step in play(plan.scheduler(), lambda _: 2.0)] == [
        (0, P, (0,)),
        (2, D, (0,)),
        (4, P, (1, 2)),
        (6, D, (1, 2)),
        (8, D, (1,)),
    ]


def test_two_runs_of_the_same_requests_do_not_share_a_state(tmp_path: Path) -> None:
    plan = schedule_of(requests_of((2, 2), (1, 3)), arriving(tmp_path, 0, 5, batch=2, batching="continuous"))
    assert isinstance(plan, Requests)
    first, second = (play(plan.scheduler(), seconds) for _ in range(2))
    assert table([step for _, _, step in first]) == table([step for _, _, step in second])


@given(traces(), st.integers(1, 5))
def test_lanes_in_lock_step_make_the_batches_of_lock_step(trace: Trace, batch: int) -> None:
    spec = BatchSpec(batch=batch)
    assert table(Requests(trace, spec, None).in_order().steps) == table(lock_step(trace, batch).steps)


@given(traces(), st.sampled_from(["lock-step", "continuous"]))
def test_one_lane_is_one_at_a_time(trace: Trace, batching: Any) -> None:
    workload = Requests(trace, BatchSpec(batching=batching), None).in_order()
    assert table(workload.steps) == table(one_at_a_time(trace).steps)
    assert workload.describe() == one_at_a_time(trace).describe()


@given(plans())
def test_every_row_is_computed_once_in_order_of_its_sequence(plan: Requests) -> None:
    trace, played = plan.trace, play(plan.scheduler(), seconds)
    steps = [step for _, _, step in played]
    rows = np.concatenate([step.rows for step in steps])
    assert sorted(rows.tolist()) == list(range(len(trace)))
    everyone = sorted(set(trace.sequence.tolist()))
    for sequence in everyone:
        assert (np.diff(trace.position[rows[trace.sequence[rows] == sequence]]) == 1).all()
    assert sorted(one for step in steps for one in step.starts) == everyone
    assert sorted(one for step in steps for one in step.ends) == everyone
    for index, step in enumerate(steps):
        assert step.index == index
        assert set(trace.phase[step.rows].tolist()) == {step.phase}
        assert trace.sequence[step.rows].tolist() == np.repeat(step.sequences, step.tokens).tolist()
        assert step.context >= trace.position[step.rows].max() + 1
    assert max(step.context for step in steps) == plan.context


@given(plans())
def test_lanes_chunks_and_arrivals_are_respected(plan: Requests) -> None:
    spec, scheduler = plan.spec, plan.scheduler()
    arrival_s = scheduler.arrival_s
    waiting, under_way, free_s = {*plan.trace.sequence.tolist()}, set[int](), 0.0
    for start_s, end_s, step in play(scheduler, seconds):
        assert all(arrival_s.get(one, 0.0) <= start_s for one in step.sequences)
        idle_until = min((arrival_s.get(one, 0.0) for one in waiting), default=0.0) if not under_way else 0.0
        assert start_s == max(free_s, idle_until)  # idle only while nobody is there
        under_way |= {*step.starts}
        assert under_way >= {*step.sequences}
        assert step.others == len(under_way - {*step.sequences})
        assert len(under_way) <= spec.batch
        if step.phase == P and spec.prefill_chunk:
            assert sum(step.tokens) <= spec.prefill_chunk
        if step.phase == D:
            assert set(step.tokens) == {1}
        waiting -= {*step.starts}
        under_way -= {*step.ends}
        free_s = end_s


@given(plans(batching="continuous"))
def test_whoever_decodes_waits_for_one_prefill_pass_at_most(plan: Requests) -> None:
    decoding: set[int] = set()
    before = D
    left = {one: int((plan.trace.sequence == one).sum()) for one in set(plan.trace.sequence.tolist())}
    prompts = {one: int(((plan.trace.sequence == one) & (plan.trace.phase == P)).sum()) for one in left}
    done = dict.fromkeys(left, 0)
    for _, _, step in play(plan.scheduler(), seconds):
        assert step.phase == D or before == D or not decoding
        assert step.phase == P or {*step.sequences} >= decoding
        for one, count in zip(step.sequences, step.tokens, strict=True):
            done[one] += count
            if prompts[one] <= done[one] < left[one]:
                decoding.add(one)
            else:
                decoding.discard(one)
        before = step.phase


@given(plans(batching="continuous"))
def test_first_come_first_served(plan: Requests) -> None:
    if plan.spec.prefill_chunk or (plan.trace.phase == D).all():
        return
    steps = [step for _, _, step in play(plan.scheduler(), seconds)]
    _, first = np.unique(plan.trace.sequence, return_index=True)
    order = plan.trace.sequence[np.sort(first)].tolist()
    with_prompt = {one for step in steps if step.phase == P for one in step.sequences}
    begun = [one for step in steps if step.phase == P for one in step.starts]
    assert begun == [one for one in order if one in with_prompt]


@given(plans(arrivals=None), st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5))
def test_without_arrivals_the_order_does_not_depend_on_time(plan: Requests, times_s: list[float]) -> None:
    played = play(plan.scheduler(), lambda step: times_s[step.index % len(times_s)])
    assert table([step for _, _, step in played]) == table(plan.in_order().steps)


def one_token_each(rate_per_s: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals, and waits before a service of 1 s, of Poisson requests on one lane."""
    plan = schedule_of(requests_of(*[(0, 1)] * count), BatchSpec(arrivals="poisson", rate_per_s=rate_per_s, seed=1))
    assert isinstance(plan, Requests)
    assert plan.arrivals is not None
    begun = np.array([start for start, _, _ in play(plan.scheduler(), lambda _: 1.0)])
    return plan.arrivals.times_s, begun - plan.arrivals.times_s


def test_one_lane_is_a_queue_with_one_server() -> None:
    """Lindley's recursion to the last request, and the mean wait of M/D/1, rho / (2 (1 - rho)) services."""
    arrivals, waits = one_token_each(0.5, 5_000)
    expected, wait = [], 0.0
    for gap in np.diff(arrivals, append=arrivals[-1]):
        expected.append(wait)
        wait = max(0.0, wait + 1.0 - gap)
    np.testing.assert_allclose(waits, expected, atol=1e-6)
    assert waits.mean() == pytest.approx(0.5, rel=0.1)


def test_the_queue_grows_when_more_arrives_than_is_served() -> None:
    _, waits = one_token_each(2.0, 2_000)
    assert waits[-1] == pytest.approx(1_000, rel=0.1)
    assert waits[-200:].mean() > 5 * waits[:200].mean()


def test_requests_that_all_arrive_at_once_have_a_known_order(tmp_path: Path) -> None:
    workload = schedule_of(requests_of((1, 1), (1, 1)), arriving(tmp_path, 0, 0, batch=2, batching="continuous"))
    assert isinstance(workload, Workload)
    assert known_order(workload, "belady") is workload
    assert InOrder(workload).arrival_s == {0: 0.0, 1: 0.0}
    assert InOrder(workload.steps).arrival_s == {}


def test_who_knows_the_future_cannot_have_arrivals(tmp_path: Path) -> None:
    plan = schedule_of(requests_of((1, 1), (1, 1)), arriving(tmp_path, 0, 1))
    with pytest.raises(InputError, match=r"^arrivals must be left out .* for belady, .* got .*times\.csv$"):
        known_order(plan, "belady")


def test_what_ran_describes_itself() -> None:
    spec = BatchSpec(batch=2, batching="continuous", prefill_chunk=3, arrivals="poisson", rate_per_s=0.5, seed=7)
    plan = schedule_of(requests_of((5, 1), (1, 2)), spec)
    assert isinstance(plan, Requests)
    assert (plan.batch, plan.context) == (2, 6)
    scheduler = plan.scheduler()
    assert isinstance(scheduler, Lanes)
    play(scheduler, seconds)
    ran = scheduler.ran()
    assert ran.arrival_s == dict(enumerate(plan.arrivals.times_s))
    assert ran.describe() == {
        "order": "continuous",
        "batch": 2,
        "sequences": 2,
        "prefill_steps": sum(step.phase == P for step in ran),
        "decode_steps": sum(step.phase == D for step in ran),
        "prompt_tokens": 6,
        "new_tokens": 3,
        "prefill_chunk": 3,
        "arrivals": "poisson",
        "rate_per_s": 0.5,
        "seed": 7,
    }


def test_a_plain_spec_is_lock_step() -> None:
    trace = requests_of((2, 1), (1, 2))
    workload = schedule_of(trace, BatchSpec(batch=2))
    assert isinstance(workload, Workload)
    assert table(workload.steps) == table(lock_step(trace, 2).steps)
    assert workload.describe() == lock_step(trace, 2).describe()


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"batch": 0}, "batch must be greater than 0, got 0"),
        ({"batching": "static"}, "batching must be 'lock-step' or 'continuous', got 'static'"),
        ({"prefill_chunk": -1}, "prefill_chunk must be greater than or equal to 0, got -1"),
        ({"arrivals": "poisson"}, "rate_per_s must be given with poisson arrivals, got nothing"),
        ({"rate_per_s": 2.0}, "rate_per_s must be left out without arrivals, got 2"),
        ({"arrivals": "poisson", "rate_per_s": 0.0}, "rate_per_s must be greater than or equal to 0.000001, got 0.0"),
        ({"arrivals": "poisson", "rate_per_s": float("inf")}, "rate_per_s must be a finite number, got inf"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        ({"prefill_chunks": 2}, "field must be a known name, got 'prefill_chunks' (did you mean prefill_chunk?)"),
    ],
)
def test_a_spec_that_makes_no_sense(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError) as error:
        BatchSpec.of(**values)
    assert str(error.value) == fault


def test_a_spec_is_built_of_its_values() -> None:
    assert BatchSpec.of(batch=3, batching="continuous") == BatchSpec(batch=3, batching="continuous")
