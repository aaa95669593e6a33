from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from analysis.compare import compare
from analysis.decisions import compare_decisions
from sim.results import RunResult
from traces.errors import InputError

Make = Callable[..., RunResult]


def test_equal_decisions(measured: RunResult, simulated: RunResult) -> None:
    decisions = compare(measured, simulated).decisions
    assert decisions.exact
    assert decisions.first_mismatch == ""
    totals = {check.column: (check.measured, check.rows) for check in decisions.checks}
    assert totals["misses"] == (10, 8)
    assert totals["bytes"] == (900, 8)


def test_a_different_count_is_named(measured: RunResult, simulated: RunResult) -> None:
    simulated.layers.loc[3, "misses"] = 5
    simulated.layers.loc[5, "misses"] = 0
    decisions = compare_decisions(measured, simulated)
    checks = {check.column: check for check in decisions.checks}
    assert checks["misses"].mismatching == 2
    assert checks["misses"].first == "step 1, layer 1: misses is 0 measured, 5 simulated"
    assert checks["bytes"].exact
    assert not decisions.exact


def test_equal_totals_do_not_hide_different_rows(measured: RunResult, simulated: RunResult) -> None:
    rows = simulated.layers["hits_union"]
    simulated.layers["hits_union"] = rows.iloc[[0, 1, 3, 2, 4, 5, 6, 7]].to_numpy()
    check = next(check for check in compare_decisions(measured, simulated).checks if check.column == "hits_union")
    assert check.measured == check.simulated
    assert check.mismatching == 2


def test_a_missing_row_is_a_mismatch(measured: RunResult, simulated: RunResult) -> None:
    simulated.layers = simulated.layers.iloc[:-1]
    decisions = compare_decisions(measured, simulated)
    assert all(check.mismatching == 1 and check.rows == 8 for check in decisions.checks)
    assert decisions.first_mismatch == "step 3, layer 1: only the measured run has this row"


def test_operation_logs_are_compared_entry_for_entry(measured: RunResult, simulated: RunResult) -> None:
    simulated.operations.loc[2, "slot"] = 3
    log = compare_decisions(measured, simulated).operations
    assert log is not None
    assert (log.mismatching, log.promised, log.exact) == (1, True, False)
    assert log.first == "entry 2 (step 0, layer 1): slot=2 measured, slot=3 simulated"
    assert not compare_decisions(measured, simulated).exact


def test_a_shorter_log_differs(measured: RunResult, simulated: RunResult) -> None:
    entries = len(simulated.operations)
    simulated.operations = simulated.operations.iloc[:-2]
    log = compare_decisions(measured, simulated).operations
    assert log is not None
    assert log.mismatching == 2
    assert log.first == (f"entry {entries - 2}: the logs have {entries} entries measured, {entries - 2} simulated")


def test_overlapping_modes_do_not_promise_the_order(make_run: Make) -> None:
    system = {"evict": "lru", "synchronous": False}
    measured, simulated = (make_run(source, system=system) for source in ("measured", "simulated"))
    simulated.operations = simulated.operations.iloc[::-1]
    decisions = compare_decisions(measured, simulated)
    assert decisions.operations is not None
    assert not decisions.operations.exact
    assert decisions.exact


def pair(make_run: Make, **system: object) -> list[RunResult]:
    return [make_run(source, system={"evict": "lru", **system}) for source in ("measured", "simulated")]


@pytest.mark.parametrize(
    ("system", "promised"),
    [
        ({"prefetch": "next-router", "synchronous": False}, False),
        ({"prefetch": "next-router", "synchronous": True}, True),
        ({"prefetch": "none", "synchronous": False}, True),
        ({"prefetch": "next-router", "mode": "synchronous"}, False),
    ],
)
def test_counts_are_promised_unless_copies_are_made_ahead(
    make_run: Make, system: dict[str, object], promised: bool
) -> None:
    measured, simulated = pair(make_run, **system)
    simulated.layers.loc[3, "hits_union"] = 1
    decisions = compare_decisions(measured, simulated)
    assert decisions.promised is promised
    assert decisions.exact is not promised
    assert not decisions.equal
    check = next(check for check in decisions.checks if check.column == "hits_union")
    assert (check.measured, check.simulated, check.promised) == (8, 7, promised)


@pytest.mark.parametrize("column", ["assignments", "union"])
def test_what_the_router_asked_for_is_always_promised(make_run: Make, column: str) -> None:
    measured, simulated = pair(make_run, prefetch="next-router")
    simulated.layers.loc[2, "hits_union"] = 0
    simulated.layers.loc[3, column] = 5
    decisions = compare_decisions(measured, simulated)
    assert not decisions.exact
    assert decisions.first_mismatch == f"step 1, layer 1: {column} is 2 measured, 5 simulated"


def test_every_repeat_keeps_the_promise(measured: RunResult, simulated: RunResult, slower: RunResult) -> None:
    assert compare(measured, simulated, repeats=[slower]).decisions.exact
    slower.layers.loc[[3, 5], "bytes"] = 7
    measured.layers.loc[5, "bytes"] = 8
    decisions = compare(measured, simulated, repeats=[slower]).decisions
    check = next(check for check in decisions.checks if check.column == "bytes")
    assert not decisions.exact
    assert (check.rows, check.mismatching) == (8, 2)
    assert check.first == "step 2, layer 1: bytes is 8 measured, 100 simulated"
    measured.layers.loc[5, "bytes"] = 100
    decisions = compare(measured, simulated, repeats=[slower]).decisions
    assert decisions.first_mismatch == "step 1, layer 1, repeat 2: bytes is 7 measured, 0 simulated"


def test_repeats_may_differ_where_nothing_is_promised(make_run: Make) -> None:
    measured, simulated = pair(make_run, prefetch="next-router")
    other, _ = pair(make_run, prefetch="next-router")
    other.layers.loc[3, "hits_union"] = 1
    decisions = compare_decisions(measured, simulated, [other])
    assert decisions.exact
    assert decisions.equal
    other.layers.loc[3, "union"] = 1
    assert not compare_decisions(measured, simulated, [other]).exact


def test_runs_without_a_log_are_compared_by_counts(measured: RunResult, simulated: RunResult) -> None:
    simulated.operations = simulated.operations.iloc[:0]
    assert compare_decisions(measured, simulated).operations is None


def test_time_by_token(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    assert outcome.tokens["step"].tolist() == [1, 2, 3]
    assert outcome.tokens["measured_s"].to_numpy() == pytest.approx([0.010, 0.012, 0.008])
    assert outcome.tokens["simulated_s"].to_numpy() == pytest.approx([0.011, 0.012, 0.006])
    assert outcome.tokens["error"].to_numpy() == pytest.approx([0.1, 0.0, -0.25])
    assert outcome.error.median == pytest.approx(0.1)
    assert outcome.error.bias == pytest.approx(-0.05)


def test_prefill_stands_apart(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    assert outcome.prefill.tokens == 1
    assert outcome.prefill.median == pytest.approx(0.1)
    assert outcome.prefill_ms == pytest.approx((20.0, 22.0))


def test_components_by_hand(measured: RunResult, simulated: RunResult) -> None:
    parts = {part.name: part for part in compare(measured, simulated).components}
    assert (parts["gpu_experts_s"].measured_ms, parts["gpu_experts_s"].simulated_ms) == pytest.approx((4.0, 10 / 3))
    assert parts["gpu_experts_s"].difference_ms == pytest.approx(-2 / 3)
    assert parts["gpu_experts_s"].of_token == pytest.approx(-2 / 30)
    assert parts["stall_s"].difference_ms == pytest.approx(0.5)
    assert parts["other_s"].difference_ms == pytest.approx(-0.5 / 3)
    assert not parts["transfer_s"].critical


def test_critical_components_add_up(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    assert sum(part.measured_ms for part in outcome.critical()) == pytest.approx(10.0)
    assert sum(part.simulated_ms for part in outcome.critical()) == pytest.approx(29 / 3)
    assert sum(part.of_token for part in outcome.critical()) == pytest.approx(-1 / 30)


def test_one_measurement_has_no_noise_and_no_skill(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    assert outcome.repeats == 1
    assert math.isnan(outcome.noise)
    assert math.isnan(outcome.skill)


def test_repeats_give_minimum_and_noise(measured: RunResult, simulated: RunResult, slower: RunResult) -> None:
    outcome = compare(slower, simulated, repeats=[slower, measured])
    assert outcome.repeats == 2
    assert outcome.tokens["measured_s"].to_numpy() == pytest.approx([0.010, 0.012, 0.008])
    assert outcome.noise == pytest.approx(0.05)
    assert outcome.prefill_ms[0] == pytest.approx(20.0)
    assert outcome.measured_summary.tokens_per_s == pytest.approx(100.0)


def test_skill_against_the_calibration_mean(measured: RunResult, simulated: RunResult) -> None:
    assert compare(measured, simulated, calibration_mean_s=0.010).skill == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trace_digest", "d2", "trace_digest must be equal in both runs, got d1 (measured) and d2 (simulated)"),
        ("capacity_slots", 8, "capacity_slots must be equal in both runs, got 4 (measured) and 8 (simulated)"),
        ("capacity_bytes", 8, "capacity_bytes must be equal in both runs, got 400 (measured) and 8 (simulated)"),
        ("staging_slots", 1, "staging_slots must be equal in both runs, got 2 (measured) and 1 (simulated)"),
        ("model", "other", "model must be equal in both runs, got tiny-moe (measured) and other (simulated)"),
        (
            "system",
            {"evict": "lfu", "prefetch": "none", "place": "fetch", "scope": "layer", "synchronous": True},
            "system.evict must be equal in both runs, got lru (measured) and lfu (simulated)",
        ),
        ("system", {}, "system.evict must be equal in both runs, got lru (measured) and absent (simulated)"),
    ],
)
def test_runs_of_other_work_are_refused(
    measured: RunResult, make_run: Make, field: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as error:
        compare(measured, make_run("simulated", **{field: value}))
    assert str(error.value) == message


def test_another_repeat_is_refused(measured: RunResult, simulated: RunResult, make_run: Make) -> None:
    with pytest.raises(InputError, match=r"got d1 \(the first\) and d2 \(the second\)"):
        compare(measured, simulated, repeats=[make_run("measured", trace_digest="d2")])


def test_sources_are_checked(measured: RunResult, simulated: RunResult) -> None:
    with pytest.raises(InputError, match="source of the measured run must be 'measured', got 'simulated'"):
        compare(simulated, simulated)
    with pytest.raises(InputError, match="source of the simulated run must be 'simulated', got 'measured'"):
        compare(measured, measured)
    with pytest.raises(InputError, match="source of the measured run"):
        compare(measured, simulated, repeats=[simulated])


def test_other_tokens_are_refused(measured: RunResult, simulated: RunResult) -> None:
    simulated.tokens.loc[2, "sequence"] = 7
    with pytest.raises(InputError, match=r"row 2 of tokens must be equal .* sequence 0, .* sequence 7, "):
        compare(measured, simulated)
    simulated.tokens = simulated.tokens.iloc[:-1]
    with pytest.raises(InputError, match=r"rows of tokens must be equal in both runs, got 4 \(measured\) and 3"):
        compare(measured, simulated)


def test_prefill_alone_is_refused(measured: RunResult, simulated: RunResult) -> None:
    for run in (measured, simulated):
        run.tokens = run.tokens.iloc[:1]
    with pytest.raises(InputError, match="tokens must have decode rows, got none"):
        compare(measured, simulated)


def test_decode_without_prefill(measured: RunResult, simulated: RunResult) -> None:
    for run in (measured, simulated):
        run.tokens = run.tokens.iloc[1:]
        run.layers = run.layers[run.layers["step"] > 0]
    outcome = compare(measured, simulated)
    assert outcome.prefill.tokens == 0
    assert math.isnan(outcome.prefill_ms[0])
    assert outcome.to_dict()["prefill"]["median"] is None


def test_a_clock_that_stood_still_is_refused(measured: RunResult, simulated: RunResult) -> None:
    measured.tokens["end_s"] = measured.tokens["start_s"]
    with pytest.raises(InputError, match=r"measured latency must be above 0 s, got 0\.0"):
        compare(measured, simulated)


def test_to_dict_is_json(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    told = json.loads(json.dumps(outcome.to_dict(), allow_nan=False))
    assert told["decisions"]["exact"] is True
    assert told["noise"] is None
    assert told["error"]["median"] == pytest.approx(0.1)
    assert told["decisions"]["promised"] is True
    assert "tokens" not in told
