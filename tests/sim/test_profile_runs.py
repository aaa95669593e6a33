"""What a profile's costs are in one run: the policies' own time, few slots, chunks, and layers with CPU experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sim.profile import ProfileCosts
from sim.results import COLUMNS
from sim.run import simulate
from sim.spec import HostSpec
from sim.spec.profile import TO_DEVICE, TO_HOST, DensePoint, Planning, Pool, Profile, Transfers
from sim.systems import Budget, SystemSpec
from tests.sim import hand
from tests.sim.profiles import SPEC, point
from traces.synthetic import Sizes, zipf
from traces.workload import one_at_a_time

PROFILE = Profile(
    name="here",
    device="cpu",
    date="2026-01-01",
    machine={},
    model=SPEC,
    host=HostSpec(source="test", layer_s=0.0, readback_s=0.0, controller_s=1.0, operation_s=0.0),
    copies=(point(SPEC.expert_bytes, 8.0),),
    gpu_expert=(point(1, 4.0),),
    cpu_expert_first=(point(1, 2.0),),
    cpu_expert_later=(point(1, 2.0),),
    dense=(DensePoint(tokens=1, base_s=0, per_context_s=0, least_context=1, most_context=99, p90_s=1, repeats=3),),
    head=(point(1, 0.0),),
    lookahead_s=0.0,
    chunk_bytes=SPEC.expert_bytes // 4,
    small_pool=Pool(slots=3, copies=(point(SPEC.expert_bytes, 6.0),), gpu_expert=(point(1, 3.0),)),
    planning=(
        Planning(kind="evict", policy="mrs", layer_s=0.25),
        Planning(kind="place", policy="hybrimoe", layer_s=0.5),
        Planning(kind="prefetch", policy="impact", layer_s=0.125),
    ),
    token_s=1.0,
)
COSTS = ProfileCosts(PROFILE)


def test_the_time_of_each_policy_is_added_to_that_of_deciding() -> None:
    assert COSTS.for_run(SystemSpec(), 9).host.controller_s == 1.0
    assert COSTS.for_run(SystemSpec(evict="mrs"), 9).host.controller_s == 1.25
    both = COSTS.for_run(SystemSpec(evict="mrs", place="hybrimoe", prefetch="impact"), 9)
    assert both.host.controller_s == 1.875
    assert both.name == COSTS.name
    assert COSTS.host.controller_s == 1.0


def test_a_run_of_few_slots_is_quicker() -> None:
    few, many = COSTS.for_run(SystemSpec(), 3), COSTS.for_run(SystemSpec(), 4)
    assert (few.copy_s(SPEC.expert_bytes), few.gpu_expert_s(1)) == (6.0, 3.0)
    assert (many.copy_s(SPEC.expert_bytes), many.gpu_expert_s(1)) == (8.0, 4.0)


def test_a_chunk_takes_its_share_of_a_copy() -> None:
    assert COSTS.chunk_bytes == SPEC.expert_bytes // 4
    assert COSTS.copy_s(COSTS.chunk_bytes) == pytest.approx(2.0)
    whole = ProfileCosts(PROFILE.model_copy(update={"chunk_bytes": 0}))
    assert whole.copy_s(SPEC.expert_bytes // 4) == 8.0
    assert whole.notes != []


def test_copies_by_size_change_nothing_of_runs_that_copy_whole_experts() -> None:
    """Whatever the other sizes take: decisions and seconds are the same to the last bit."""
    sizes = Sizes(
        sequences=2, prompt_tokens=3, new_tokens=8, layers=2, experts=8, top_k=2, expert_bytes=SPEC.expert_bytes
    )
    workload = one_at_a_time(zipf(np.random.default_rng(1), sizes))
    strange = (point(SPEC.expert_bytes // 4, 0.3), point(SPEC.expert_bytes, 0.7), point(8 * SPEC.expert_bytes, 9.9))
    tables = tuple(
        Transfers(direction=way, memory="pageable", beside_gpu=False, points=strange) for way in (TO_DEVICE, TO_HOST)
    )
    other = ProfileCosts(PROFILE.model_copy(update={"transfers": tables}))
    for place in ("fetch", "fiddler", "hybrimoe"):
        one, same = (
            simulate(workload, SystemSpec(place=place), Budget(slots=3), costs, hardware="here")
            for costs in (COSTS, other)
        )
        for name in COLUMNS:
            pd.testing.assert_frame_equal(getattr(one, name), getattr(same, name), check_exact=True)
        assert one.info.costs == COSTS.name != same.info.costs
    assert other.copy_s(COSTS.chunk_bytes) != COSTS.copy_s(COSTS.chunk_bytes)
    quick = other.for_run(SystemSpec(), 3)
    assert quick.copy_s(SPEC.expert_bytes) == 6.0
    assert quick.copy_s(COSTS.chunk_bytes) == pytest.approx(6.0 * 0.3 / 0.7)


def test_a_simulated_run_is_charged_for_what_its_policies_take() -> None:
    sizes = Sizes(sequences=1, prompt_tokens=0, new_tokens=3, layers=2, experts=8, top_k=2, expert_bytes=7)
    workload = one_at_a_time(zipf(np.random.default_rng(0), sizes))
    for system, seconds in ((SystemSpec(), 1.0), (SystemSpec(place="hybrimoe"), 1.5)):
        run = simulate(workload, system, Budget(slots=8), COSTS, hardware="here")
        assert run.layers.python_s.to_numpy() == pytest.approx(seconds)


def test_a_layer_with_cpu_experts_costs_the_host_more() -> None:
    given = hand.host(controller_s=0.5, cpu_s=0.25, join_s=0.125, cpu_join_s=0.0625, joins_layers=True)
    costs = hand.HandCosts(host=given)
    trace = hand.trace_of([[[0]], [[1]]])
    run = hand.run(trace, 1, costs, place="cpu-on-miss", prefetch="none")
    assert run.layers.cpu_experts.to_list() == [0, 1]
    assert run.layers.host_s.to_list() == pytest.approx([0.5 + 0.125, 0.75 + 0.1875])
    assert run.layers.python_s.to_list() == pytest.approx([0.5, 0.75])


def test_a_profile_without_the_new_tables_is_still_read() -> None:
    plain = PROFILE.model_dump(exclude={"planning", "small_pool", "chunk_bytes"})
    costs = ProfileCosts(Profile.model_validate(plain)).for_run(SystemSpec(evict="mrs"), 1)
    assert (costs.host.controller_s, costs.chunk_bytes, costs.gpu_expert_s(1)) == (1.0, 0, 4.0)
