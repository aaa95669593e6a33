"""The laws of the engine's resources on random runs, and the agreement of its machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import BEFORE
from sim.policies import EVICTION, PLACEMENT, PREFETCH
from sim.results import COLUMNS, RunResult
from sim.systems import SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, host, run, trace_of, workloads
from traces.workload import Workload

SYSTEMS = st.fixed_dictionaries(
    {
        "evict": st.sampled_from([name for name, kind in EVICTION.items() if "calibration" not in kind.needs]),
        "place": st.sampled_from([*PLACEMENT]),
        "prefetch": st.sampled_from([name for name, kind in PREFETCH.items() if "calibration" not in kind.needs]),
        "scope": st.sampled_from(["layer", "global"]),
        "synchronous": st.booleans(),
        "write_back": st.booleans(),
    }
)
PLACED = st.tuples(SYSTEMS, st.booleans()).map(lambda drawn: {**drawn[0], "dense_follows": drawn[1]})
"""The same, some with dense work on the CPU."""
HOST_SLOTS = st.none() | st.integers(1, 18)
"""None: the host's memory holds all experts."""
DYADIC = st.sampled_from([0.25, 0.75, 1.0, 1.25, 3.125, 8.0])
"""Seconds whose sums are exact, so that two machines that add them up in different orders agree on what is equal."""


ODD, SOON = st.sampled_from([0.25, 0.7, 1.0, 1.3, 3.1, 8.0]), st.sampled_from([0.0, 0.1, 0.9])


@st.composite
def some_costs(
    draw: st.DrawFn,
    *,
    slow: bool = False,
    second: st.SearchStrategy[float] = ODD,
    idle: st.SearchStrategy[float] = SOON,
) -> HandCosts:
    """Costs of a few odd numbers, so that times are seldom equal by chance, unless others are given."""
    factors = {pair: draw(st.sampled_from([1.0, 1.5, 2.0])) for pair in (("gpu", "link"), ("link", "cpu"))}
    return HandCosts(
        dense=draw(second),
        head=draw(second),
        gpu=draw(second),
        gpu_token=draw(idle),
        cpu=draw(second),
        cpu_first=draw(idle),
        copy=draw(second),
        back=draw(second),
        read=draw(second),
        cpu_dense=draw(second),
        lookahead=draw(idle),
        slow=factors if slow else {},
        host=host(
            layer_s=draw(idle),
            readback_s=draw(idle),
            controller_s=draw(idle),
            operation_s=draw(idle),
            join_s=draw(idle),
            joins_layers=draw(st.booleans()),
        ),
    )


def events_of(result: RunResult, resource: str) -> pd.DataFrame:
    return result.events[result.events["resource"] == resource].sort_values(["start_s", "end_s"])


@settings(max_examples=60)
@given(workloads(), st.integers(1, 6), HOST_SLOTS, PLACED, some_costs(slow=True), st.booleans())
def test_no_resource_does_two_things_at_once(
    workload: Workload, slots: int, host_slots: int | None, system: dict[str, Any], costs: HandCosts, chunks: bool
) -> None:
    chunked = {"chunk_bytes": 30, "copy_sizes": {30: costs.copy / 3}} if chunks else {}
    result = run(workload, slots, replace(costs, **chunked), host_slots=host_slots, **system)
    for resource in ("gpu", "link", "cpu", "host", "link-back", "disk"):
        rows = events_of(result, resource)
        assert (rows["start_s"].to_numpy()[1:] >= rows["end_s"].to_numpy()[:-1] - 1e-9).all(), resource
    if system["synchronous"]:
        rows = result.events[result.events["end_s"] > result.events["start_s"]]
        assert (rows["start_s"].to_numpy()[1:] >= rows["end_s"].to_numpy()[:-1] - 1e-9).all()


@settings(max_examples=60)
@given(workloads(), st.integers(1, 6), HOST_SLOTS, SYSTEMS, some_costs())
def test_busy_time_is_the_sum_of_the_work_and_a_bound_on_the_makespan(
    workload: Workload, slots: int, host_slots: int | None, system: dict[str, Any], costs: HandCosts
) -> None:
    result = run(workload, slots, costs, host_slots=host_slots, **system)
    steps, layers = len(workload), workload.trace.header.layers
    operations = result.operations[result.operations["step"] != BEFORE]
    kernels = operations[operations["op"] == "gpu"]
    depth = SystemSpec(**system).lookahead_depth
    routers = sum(min(depth, layers - 1 - layer) for layer in range(layers))
    dense_s = steps * (layers * costs.dense + routers * costs.lookahead + costs.head)
    gpu_s = dense_s + len(kernels) * costs.gpu + kernels["tokens"].sum() * costs.gpu_token
    on_cpu = operations[operations["op"] == "cpu"]
    cpu_s = len(on_cpu) * costs.cpu + len(on_cpu.drop_duplicates(["step", "layer"])) * costs.cpu_first
    link_s = (operations["op"] == "copy").sum() * costs.copy
    back_s = (operations[operations["op"] == "evict"]["bytes"] > 0).sum() * costs.back
    disk_s = (operations["op"] == "read").sum() * costs.read
    end_s = result.events["end_s"].max()
    busy = {"gpu": gpu_s, "cpu": cpu_s, "link": link_s, "link-back": back_s, "disk": disk_s}
    for resource, expected in busy.items():
        rows = events_of(result, resource)
        busy_s = float((rows["end_s"] - rows["start_s"]).sum())
        assert busy_s == pytest.approx(expected, rel=1e-9, abs=1e-9), resource
        assert end_s >= busy_s * (1 - 1e-9)
    layer_sums = result.layers[["gpu_experts_s", "cpu_experts_s", "dense_s"]].sum()
    assert layer_sums["gpu_experts_s"] == pytest.approx(gpu_s - dense_s, abs=1e-9)
    assert layer_sums["cpu_experts_s"] == pytest.approx(cpu_s, abs=1e-9)
    assert layer_sums["dense_s"] == pytest.approx(dense_s - steps * costs.head, abs=1e-9)


@settings(max_examples=60)
@given(workloads(), st.integers(1, 6), st.none() | st.integers(1, 18), SYSTEMS)
def test_bytes_are_loads_times_size_and_write_backs(
    workload: Workload, slots: int, host_slots: int | None, system: dict[str, Any]
) -> None:
    result = run(workload, slots, host_slots=host_slots, **system)
    operations = result.operations
    moved = operations.groupby("op")["bytes"].sum()
    count = operations.groupby("op")["n"].count()
    assert moved.get("copy", 0) == count.get("copy", 0) * EXPERT_BYTES
    assert moved.get("evict", 0) == system["write_back"] * count.get("evict", 0) * EXPERT_BYTES
    assert moved.get("read", 0) == count.get("read", 0) * EXPERT_BYTES
    rows = result.events.groupby("kind")["step"].count()
    later = operations[operations["step"] != BEFORE].groupby("op")["n"].count()
    assert rows.get("copy", 0) + rows.get("prefetch", 0) == later.get("copy", 0)
    assert rows.get("write-back", 0) == system["write_back"] * later.get("evict", 0)
    assert rows.get("read", 0) == later.get("read", 0)


@settings(max_examples=60)
@given(workloads(), st.integers(1, 6), PLACED, some_costs(slow=True))
def test_the_components_of_a_layer_add_up_to_its_time(
    workload: Workload, slots: int, system: dict[str, Any], costs: HandCosts
) -> None:
    layers = run(workload, slots, costs, **system).layers
    parts = layers[["dense_s", "gpu_experts_s", "host_s", "stall_s"]].sum(axis=1)
    wall = layers["end_s"] - layers["start_s"]
    np.testing.assert_allclose(parts, wall, atol=1e-9)


@settings(max_examples=40)
@given(workloads(), st.integers(1, 6), SYSTEMS, some_costs(slow=True))
def test_a_run_is_repeatable(workload: Workload, slots: int, system: dict[str, Any], costs: HandCosts) -> None:
    first, second = (run(workload, slots, costs, **system) for _ in range(2))
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))


@settings(max_examples=150)
@given(workloads(), st.integers(1, 6), HOST_SLOTS, PLACED, some_costs())
def test_the_closed_form_and_the_events_tell_the_same_story(
    workload: Workload, slots: int, host_slots: int | None, system: dict[str, Any], costs: HandCosts
) -> None:
    without = {**system, "prefetch": "none"}
    assert_same_story(workload, slots, costs, host_slots=host_slots, **without)


@settings(max_examples=150)
@given(workloads(), st.integers(1, 6), SYSTEMS, some_costs(second=DYADIC, idle=st.sampled_from([0.0, 0.25, 1.0])))
def test_they_agree_on_prefetches_too(workload: Workload, slots: int, system: dict[str, Any], costs: HandCosts) -> None:
    assert_same_story(workload, slots, costs, **{**system, "synchronous": False})


def assert_same_story(workload: Workload, slots: int, costs: HandCosts, **system: Any) -> None:
    closed, events = (run(workload, slots, costs, closed=way, **system) for way in (True, False))
    for name in COLUMNS:
        left, right = (getattr(result, name) for result in (closed, events))
        if name == "events":
            left, right = (rows.sort_values([*COLUMNS[name]], ignore_index=True) for rows in (left, right))
        pd.testing.assert_frame_equal(left, right, rtol=1e-12, atol=1e-12, check_exact=False)


def test_the_closed_form_is_refused_where_it_would_be_wrong() -> None:
    with pytest.raises(ValueError, match="closed form"):
        run(trace_of([[[0]]]), 1, HandCosts(slow={("gpu", "link"): 2.0}), closed=True)
