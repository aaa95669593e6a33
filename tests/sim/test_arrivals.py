"""Requests that arrive over time, on the simulated clock: golden times, and laws of waiting.

Each pass takes 3 s (dense part, expert and head, 1 s each), and the first one a copy of 1 s more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings

from sim.engine import Engine
from sim.results import RunResult
from sim.run import build_controller, predictions_of, run_info
from sim.systems import Budget, SystemSpec
from tests.sim.hand import HandCosts, run
from tests.traces.requesting import arriving, plans, requests_of, table
from traces.batching import BatchSpec, Lanes, Requests, schedule_of
from traces.workload import Workload, lock_step, routings

BOTH_WAYS = pytest.mark.parametrize("closed", [True, False], ids=["closed form", "events"])


def played(plan: Requests, *, closed: bool | None = None, **system: Any) -> tuple[RunResult, Lanes, list[bool]]:
    """A whole run; also its scheduler, and whether the controller was told of a new batch, pass after pass."""
    workload: Any = plan
    spec = SystemSpec(**system)
    controller = build_controller(workload, spec, Budget(slots=2), HandCosts())
    controller.begin_step = told = Mock(wraps=controller.begin_step)  # type: ignore[method-assign]
    engine, lanes = Engine(controller, HandCosts(), closed_form=closed), plan.scheduler()
    counted = Mock()
    predictions = predictions_of(plan.trace, spec.lookahead_depth)
    engine.run(lanes, lambda step: routings(plan.trace, step), predictions, counted)
    assert counted.call_count == len(lanes.steps)
    result = engine.log.result(run_info("simulated", lanes.ran(), controller, hardware="by hand"))
    return result, lanes, [call.kwargs["new_batch"] for call in told.call_args_list]


def requests(result: RunResult) -> list[tuple[float, ...]]:
    return [*result.requests.itertuples(index=False, name=None)]


@BOTH_WAYS
def test_requests_golden(closed: bool, tmp_path: Path) -> None:
    """Two lanes. 0 runs alone; 1 and 2 arrive while it decodes, and 2 waits for a lane; 3 finds an idle machine."""
    spec = arriving(tmp_path, 1, 6, 7, 30, batch=2, batching="continuous")
    plan = schedule_of(requests_of((1, 2), (2, 1), (1, 1), (1, 0)), spec)
    assert isinstance(plan, Requests)
    result, _, new_batch = played(plan, closed=closed)
    passes = result.tokens[["sequence", "phase", "tokens", "start_s", "end_s"]]
    assert [*passes.itertuples(index=False, name=None)] == [
        (0, 0, 1, 1, 5),
        (0, 1, 1, 5, 8),
        (1, 0, 2, 8, 11),
        (0, 1, 1, 11, 14),
        (1, 1, 1, 11, 14),
        (2, 0, 1, 14, 17),
        (2, 1, 1, 17, 20),
        (3, 0, 1, 30, 33),
    ]
    assert requests(result) == [
        (0, 1, 1, 5, 14, 1, 2),
        (1, 6, 8, 11, 14, 2, 1),
        (2, 7, 14, 17, 20, 1, 1),
        (3, 30, 30, 33, 33, 1, 0),
    ]
    assert new_batch == [True, False, False, False, True, False, True]
    assert result.info.workload["order"] == "continuous"


def test_headline_of_requests_golden(tmp_path: Path) -> None:
    """The same run: first tokens after 4, 5, 10 and 3 s, then 4.5, 3 and 3 s a token; 4 requests and tokens in 32 s."""
    spec = arriving(tmp_path, 1, 6, 7, 30, batch=2, batching="continuous")
    plan = schedule_of(requests_of((1, 2), (2, 1), (1, 1), (1, 0)), spec)
    assert isinstance(plan, Requests)
    headline = played(plan)[0].headline()
    assert headline["time_to_first_token_p50_s"] == 4.5
    assert headline["time_to_first_token_p99_s"] == pytest.approx(5 + 0.97 * 5)
    assert headline["time_per_output_token_by_request_p50_s"] == 3.0
    assert headline["time_per_output_token_by_request_p99_s"] == pytest.approx(3 + 0.98 * 1.5)
    assert headline["time_per_output_token_p50_s"] == 3.0
    assert headline["requests_per_s"] == 4 / 32
    assert headline["throughput_tokens_per_s"] == 4 / 32
    assert headline["tokens_per_s"] == pytest.approx(4 / 9)


@BOTH_WAYS
def test_chunks_golden(closed: bool, tmp_path: Path) -> None:
    """The prompt of 1, five tokens in chunks of two, lets 0 decode in between; its first token follows the last."""
    spec = arriving(tmp_path, 0.5, 0.5, batch=2, batching="continuous", prefill_chunk=2)
    plan = schedule_of(requests_of((1, 3), (5, 1)), spec)
    assert isinstance(plan, Requests)
    result, _, _ = played(plan, closed=closed)
    passes = result.tokens[["sequence", "phase", "tokens", "start_s"]]
    assert [*passes.itertuples(index=False, name=None)] == [
        (0, 0, 1, 0.5),
        (1, 0, 1, 0.5),
        (0, 1, 1, 4.5),
        (1, 0, 2, 7.5),
        (0, 1, 1, 10.5),
        (1, 0, 2, 13.5),
        (0, 1, 1, 16.5),
        (1, 1, 1, 16.5),
    ]
    assert requests(result) == [(0, 0.5, 0.5, 4.5, 19.5, 1, 3), (1, 0.5, 0.5, 16.5, 19.5, 5, 1)]


def test_a_token_of_a_trace_without_prompts_follows_another() -> None:
    headline = run(lock_step(requests_of((0, 3), (0, 1)), 1), 2).headline()
    assert headline["time_to_first_token_p50_s"] == 3.5
    assert headline["time_per_output_token_by_request_p50_s"] == 3.0
    assert headline["requests_per_s"] == 2 / 13


def test_without_arrivals_a_request_arrives_when_it_begins() -> None:
    plan = schedule_of(requests_of((1, 1), (1, 2), (1, 1)), BatchSpec(batch=2, batching="continuous"))
    assert isinstance(plan, Workload)
    result = run(plan, 2)
    assert (result.requests.arrival_s == result.requests.start_s).all()
    assert result.requests.start_s.tolist() == [0, 0, 7]


@settings(max_examples=40)
@given(plans(arrivals="poisson"))
def test_both_machines_agree_and_nobody_begins_before_it_arrives(plan: Requests) -> None:
    result, lanes, _ = played(plan, closed=True)
    by_events, again, _ = played(plan, closed=False)
    assert table(lanes.steps) == table(again.steps)
    np.testing.assert_allclose(result.requests, by_events.requests)
    table_of = result.requests.set_index("sequence")
    assert table_of.arrival_s.to_dict() == {**lanes.arrival_s}
    assert (table_of.start_s >= table_of.arrival_s).all()
    assert (table_of.first_token_s >= table_of.start_s).all()
    assert (table_of.end_s >= table_of.first_token_s).all()
    assert result.requests.prompt_tokens.sum() == (plan.trace.phase == 0).sum()
    assert result.requests.new_tokens.sum() == (plan.trace.phase == 1).sum()
    times = result.tokens.drop_duplicates("step")
    assert (times.start_s.to_numpy()[1:] >= times.end_s.to_numpy()[:-1]).all()


@settings(max_examples=20)
@given(plans(arrivals="poisson", batch=1))
def test_one_lane_serves_in_turn(plan: Requests) -> None:
    rows = played(plan)[0].requests
    free_s = 0.0
    for row in rows.itertuples():
        assert row.start_s == pytest.approx(max(row.arrival_s, free_s))
        free_s = row.end_s


def test_the_same_requests_give_the_same_tables(tmp_path: Path) -> None:
    spec = BatchSpec(batch=2, batching="continuous", arrivals="poisson", rate_per_s=0.1, seed=3, prefill_chunk=2)
    plan = schedule_of(requests_of(*[(3, 2)] * 6), spec)
    assert isinstance(plan, Requests)
    first, second = (played(plan)[0] for _ in range(2))
    for name in ("requests", "tokens", "layers", "operations"):
        assert getattr(first, name).equals(getattr(second, name)), name
