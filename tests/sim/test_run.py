"""A whole simulated run: its tables, its header, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from sim.needs import check_needs
from sim.results import RunResult
from sim.run import predictions_of, routings_of, simulate
from sim.systems import Budget, SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, host, run, trace_of, workloads
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Phase, Trace
from traces.workload import Workload, lock_step, one_at_a_time, routings


def prompts_and_tokens() -> Trace:
    """Two sequences, 0 with a prompt of two tokens and one new one, 1 with one and two."""
    trace = trace_of([[[0]], [[1]], [[2]], [[0]], [[1]], [[3]]])
    trace.sequence[:] = [0, 0, 0, 1, 1, 1]
    trace.position[:] = [0, 1, 2, 0, 1, 2]
    trace.phase[:] = [0, 0, 1, 0, 1, 1]
    return trace


def test_tokens_and_requests_of_one_sequence_at_a_time() -> None:
    result = run(one_at_a_time(prompts_and_tokens()), 4)
    assert result.tokens[["step", "phase", "sequence", "tokens"]].to_numpy().tolist() == [
        [0, 0, 0, 2],
        [1, 1, 0, 1],
        [2, 0, 1, 1],
        [3, 1, 1, 1],
        [4, 1, 1, 1],
    ]
    # dense 1, then copies of 1 s that overlap all but the last kernel, then the head 1
    assert result.tokens[["start_s", "end_s"]].to_numpy().tolist() == [[0, 5], [5, 9], [9, 12], [12, 15], [15, 19]]
    assert (result.tokens["head_s"] == 1).all()
    assert result.requests.to_numpy().tolist() == [[0, 0, 0, 5, 9, 2, 1], [1, 9, 9, 12, 19, 1, 2]]


def test_a_batch_shares_its_steps() -> None:
    result = run(lock_step(prompts_and_tokens(), 2), 4)
    assert result.tokens[["step", "phase", "sequence", "tokens"]].to_numpy().tolist() == [
        [0, 0, 0, 2],
        [0, 0, 1, 1],
        [1, 1, 0, 1],
        [1, 1, 1, 1],
        [2, 1, 1, 1],
    ]
    assert result.requests[["sequence", "arrival_s", "prompt_tokens", "new_tokens"]].to_numpy().tolist() == [
        [0, 0, 2, 1],
        [1, 0, 1, 2],
    ]


def test_the_header_tells_where_a_result_comes_from() -> None:
    workload = one_at_a_time(prompts_and_tokens())
    info = run(workload, 2, scope="global", evict="lfu").info
    assert (info.source, info.model, info.hardware, info.costs) == ("simulated", "by hand", "by hand", "by hand")
    assert (info.capacity_slots, info.capacity_bytes, info.staging_slots) == (2, 2 * EXPERT_BYTES, 2)
    assert info.trace_digest == workload.trace.digest
    assert info.system == SystemSpec(evict="lfu", scope="global").model_dump()
    assert info.workload == workload.describe()
    assert set(info.software) == {"numpy", "simpy"}
    per_layer = run(trace_of([[[0], [1]]]), 2).info
    assert (per_layer.capacity_slots, per_layer.capacity_bytes) == (4, 4 * EXPERT_BYTES)


def test_tables_for_a_sweep_can_be_left_out() -> None:
    workload = one_at_a_time(prompts_and_tokens())
    system, budget = SystemSpec(), Budget(slots=2)
    full = simulate(workload, system, budget, HandCosts(), hardware="h")
    lean = simulate(workload, system, budget, HandCosts(), hardware="h", events=False, operations=False)
    assert len(full.events) > len(full.operations) > 0
    assert (len(lean.events), len(lean.operations)) == (0, 0)
    assert lean.layers.equals(full.layers)
    assert lean.tokens.equals(full.tokens)


def test_progress_is_told_after_every_step() -> None:
    calls: list[int] = []
    workload = one_at_a_time(prompts_and_tokens())
    simulate(workload, SystemSpec(), Budget(slots=1), HandCosts(), hardware="h", progress=lambda: calls.append(1))
    assert len(calls) == len(workload)


def test_a_trace_without_what_a_policy_needs_is_refused() -> None:
    system = SystemSpec(prefetch="next-router")
    with pytest.raises(
        InputError, match=r"trace must have look-ahead of depth 1 for prefetch next-router, got depth 0"
    ):
        run(trace_of([[[0]]]), 1, prefetch="next-router")
    check_needs(trace_of([[[0]]], lookahead=[[[]]]), system)
    check_needs(trace_of([[[0]]]), SystemSpec(prefetch="next-router", synchronous=True))


def test_layers_with_experts_of_different_sizes_are_refused() -> None:
    trace = trace_of([[[0], [1]]])
    header = trace.header.model_copy(update={"expert_bytes": (100, 50)})
    uneven = Trace.of(header, **dict(trace.arrays()))
    with pytest.raises(InputError, match=r"expert_bytes must be equal in all layers to run a trace, got \[50, 100\]"):
        run(uneven, 1)


def test_predictions_name_the_most_wanted_first() -> None:
    trace = trace_of([[[0], [0]]] * 3, experts=6, lookahead=[[[5, 2], []], [[2, 4], []], [[4], []]])
    trace.phase[:] = Phase.PREFILL
    (step,) = one_at_a_time(trace)
    assert predictions_of(trace, 1)(step) == [[[(2, 2), (4, 2), (5, 1)]], [[]]]
    assert predictions_of(trace, 0)(step) == ()


@settings(max_examples=50)
@given(workloads())
def test_routings_of_a_run_are_those_of_its_steps(workload: Workload) -> None:
    of_step = routings_of(workload.trace)
    assert [of_step(step) for step in workload] == [routings(workload.trace, step) for step in workload]


def test_a_layer_that_nobody_is_sent_to_still_has_its_row() -> None:
    trace = trace_of([[[0], [1]], [[0], []], [[], [1]]])
    assert (trace.expert_ids == NOT_ROUTED).sum() == 2
    result = run(trace, 1, HandCosts(host=host(controller_s=0.5)))
    assert result.layers["union"].tolist() == [1, 1, 1, 0, 0, 1]
    assert (result.layers["end_s"] - result.layers["start_s"]).tolist() == [3.5, 3.5, 2.5, 1.5, 1.5, 2.5]


def test_a_run_is_stored_and_read_back(tmp_path: Path) -> None:
    result = run(one_at_a_time(prompts_and_tokens()), 2)
    assert RunResult.load(result.save(tmp_path / "run")).layers.equals(result.layers)
