"""Bounds in seconds: equal to schedules made by hand, and below every run of every system."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.bounds import Bounds, bounds_of, fewest_misses, lower_bound, lower_bounds, regret_of, split_s
from sim.memory import MemoryPlan
from sim.policies import EVICTION, PLACEMENT, PREFETCH
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.run import simulate
from sim.scenario import Prepared
from sim.spec import HostSpec
from sim.spec.profile import Planning, Point, Pool, Profile, Slowdown
from sim.systems import Budget, SystemSpec
from tests.sim.every_preset import every_preset
from tests.sim.hand import HandCosts, host, run, trace_of, workloads
from tests.sim.profiles import SPEC, point, profile
from traces.batching import BatchSpec, schedule_of
from traces.errors import InputError
from traces.schema import Phase
from traces.workload import Workload, one_at_a_time

CLOSE = 1e-9
"""By how much sums of the same numbers in another order may differ."""


def bound(trace: Any, slots: int, costs: HandCosts) -> Bounds:
    return bounds_of(one_at_a_time(trace), costs, slots)


def times_s(result: RunResult) -> dict[int | None, float]:
    """Seconds of the passes of each phase, and of the run."""
    steps = result.tokens.drop_duplicates("step")
    by_phase = (steps.end_s - steps.start_s).groupby(steps.phase).sum().to_dict()
    return {None: float(steps.end_s.max()), **by_phase}


def assert_bounded(result: RunResult, bounds: Bounds) -> None:
    took = times_s(result)
    for phase, one in ((None, bounds.run), (Phase.PREFILL, bounds.prefill), (Phase.DECODE, bounds.decode)):
        assert one.seconds <= took.get(phase, 0.0) * (1 + CLOSE)


def test_a_chain_without_copies_is_reached_where_everything_is_there() -> None:
    """Two layers of two experts, all on the GPU: 2 x (dense 1 + experts 2) + head 1, twice."""
    trace = trace_of([[[0, 1], [2, 3]]] * 2)
    costs = HandCosts(cpu=100.0)
    found = bound(trace, 8, costs)
    assert (found.run.seconds, found.run.misses, found.run.binding) == (14.0, 0, "chain")
    assert times_s(run(trace, 4, costs, evict="static-uniform"))[None] == 14.0


def test_the_chain_uses_both_devices() -> None:
    """Four experts of 1 s on the GPU and 2 s on the CPU, 1 s more for the first: 3 s, three on the GPU and one not."""
    trace = trace_of([[[0, 1, 2, 3]]])
    costs = HandCosts(cpu=2.0, cpu_first=1.0)
    assert bound(trace, 4, costs).run.seconds == 1 + 3 + 1
    assert times_s(run(trace, 4, costs, evict="static-uniform", place="optimal"))[None] == 5.0


def test_host_work_is_part_of_the_chain_and_dispatch_runs_beside_the_experts() -> None:
    trace = trace_of([[[0], [1]]] * 3)
    for layer_s in (0.25, 2.0):
        costs = HandCosts(host=host(layer_s=layer_s, readback_s=0.5, controller_s=0.125, operation_s=0.0625), cpu=9.0)
        took = times_s(run(trace, 4, costs, evict="static-uniform"))[None]
        assert bound(trace, 8, costs).run.seconds == took == 3 * (layer_s + 2 * (1.6875 + max(1.0, layer_s)) + 1)


def test_a_host_that_joins_layers_waits_for_each() -> None:
    trace = trace_of([[[0], [1]]] * 3)
    costs = HandCosts(host=host(layer_s=2.0, join_s=0.5, joins_layers=True), cpu=9.0)
    assert bound(trace, 8, costs).run.seconds == times_s(run(trace, 4, costs, evict="static-uniform"))[None] == 36.0


def test_the_link_alone_is_reached_by_copies_without_a_gap() -> None:
    """Expert 0 is there, 1 to 3 are copied in 5 s each; all else takes no time."""
    trace = trace_of([[[0]], [[1]], [[2]], [[3]]])
    costs = HandCosts(dense=0.0, head=0.0, gpu=0.0, cpu=100.0, copy=5.0)
    found = bound(trace, 1, costs).run
    assert (found.seconds, found.misses, found.on_cpu, found.binding) == (15.0, 3, 0, "link")
    assert times_s(run(trace, 1, costs, evict="static-uniform"))[None] == 15.0


def test_the_last_copy_is_followed_by_its_expert_and_the_head() -> None:
    """A step: copy 5 from the beginning, but for the dense part 1, then expert 1 and head 1."""
    trace = trace_of([[[0]]])
    costs = HandCosts(dense=0.0, cpu=100.0, copy=5.0)
    start_empty = trace_of([[[1, 0]]])
    assert bound(start_empty, 1, costs).run.seconds == 5 + 1 + 1
    assert times_s(run(start_empty, 1, costs, evict="static-uniform"))[None] == 7.0
    assert bound(trace, 1, costs).run.seconds == 2.0


def test_link_and_cpu_share_the_misses_as_the_best_schedule_does() -> None:
    """Expert 0 is there, of three misses one is copied in 2 s and computed in 1 s, two take the CPU 2 s each."""
    trace = trace_of([[[0, 1, 2, 3]]])
    costs = HandCosts(dense=0.0, head=0.0, cpu=2.0, copy=2.0)
    found = bound(trace, 1, costs).run
    assert (found.seconds, found.misses, found.on_cpu) == (4.0, 3, 2)
    assert times_s(run(trace, 1, costs, evict="static-uniform", place="optimal"))[None] == 4.0


def test_a_first_expert_that_is_dear_on_the_cpu_is_paid_by_whole_layers() -> None:
    """Two layers of two experts: 2 s on the GPU, where those of one are, and 7 s on the CPU for the others."""
    trace = trace_of([[[0, 1], [0, 1]]])
    costs = HandCosts(dense=0.0, head=0.0, cpu_first=5.0, copy=100.0)
    found = bound(trace, 2, costs).run
    assert (found.seconds, found.misses, found.on_cpu) == (9.0, 2, 2)
    held = {"evict": "static-front", "place": "static", "scope": "global"}
    assert times_s(run(trace, 2, costs, **held))[None] == 9.0


def test_layers_that_run_on_the_cpu_as_a_whole_have_a_bound_of_their_own() -> None:
    """Dense part and expert take 0.75 s on the CPU; with the dense part on the GPU 1.5 s."""
    workload = one_at_a_time(trace_of([[[0], [1]]]))
    costs = HandCosts(cpu=0.5, cpu_dense=0.25, host=host(readback_s=0.125))
    assert bounds_of(workload, costs, 8, dense_follows=True).run.seconds == 2 * 0.75 + 1
    assert bounds_of(workload, costs, 8).run.seconds == 2 * 1.625 + 1


def test_copies_that_prefetch_hides_cost_nothing() -> None:
    """Five steps of 3 s with copies of 2 s, and expert 0 kept all along: the chain is all there is."""
    found = bound(trace_of([[[0]], [[1]], [[2]], [[3]], [[0]]]), 1, HandCosts(cpu=100.0, copy=2.0)).run
    assert (found.seconds, found.chain_s, found.misses) == (15.0, 15.0, 3)


def test_each_stretch_of_a_phase_begins_with_what_it_likes() -> None:
    """A prompt of experts 0 and 1, tokens of 2 and 3: with one slot the run copies three times, each phase once."""
    trace = trace_of([[[0]], [[1]], [[2]], [[3]]])
    trace.phase[:2] = Phase.PREFILL
    costs = HandCosts(dense=0.0, head=0.0, gpu=0.0, cpu=100.0, copy=5.0)
    found = bound(trace, 1, costs)
    assert (found.run.misses, found.prefill.misses, found.decode.misses) == (3, 1, 1)
    assert (found.run.seconds, found.prefill.seconds, found.decode.seconds) == (15.0, 5.0, 5.0)


def test_a_run_takes_at_least_what_its_phases_do() -> None:
    """A prompt that the chain binds (20 s, one copy of 5 s hidden), and tokens that the link binds (5 s)."""
    trace = trace_of([[[0, 1]], [[2]], [[3]]])
    trace.phase[:1] = Phase.PREFILL
    costs = HandCosts(dense=0.0, head=0.0, gpu=0.0, gpu_token=0.0, cpu=100.0, copy=5.0)
    found = bound(trace, 2, costs)
    assert found.run.seconds >= found.prefill.seconds + found.decode.seconds


@pytest.mark.parametrize(
    ("events", "slots", "misses"),
    [
        ([[0], [1], [0], [1]], 1, 2),  # 0 is there, then kept or not
        ([[0], [1], [0], [1]], 2, 0),
        ([[0, 1, 2]], 1, 2),
        ([[0], [1], [2], [0], [1], [2]], 2, 2),
        ([], 2, 0),
    ],
)
def test_fewest_misses_by_hand(events: list[list[int]], slots: int, misses: int) -> None:
    assert fewest_misses(events, slots) == misses


@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), max_size=5), st.integers(1, 3))
def test_fewest_misses_are_those_of_the_best_choice_of_intervals(events: list[list[int]], slots: int) -> None:
    last: dict[int, int] = {}
    intervals = []
    for event, blocks in enumerate(events):
        for block in blocks:
            intervals.append((last.get(block, -1), event))
            last[block] = event

    def fits(chosen: tuple[tuple[int, int], ...]) -> bool:
        return all(sum(start < now <= end for start, end in chosen) <= slots for now in range(len(events)))

    most = max(
        size for size in range(len(intervals) + 1) if any(fits(chosen) for chosen in combinations(intervals, size))
    )
    assert fewest_misses(events, slots) == len(intervals) - most


@given(
    st.lists(st.integers(1, 3), max_size=5),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 0.7]),
)
def test_a_layers_bound_is_below_every_split_and_exact_for_equal_tokens(
    tokens: list[int], gpu_token: float, cpu_token: float, first: float
) -> None:
    def gpu_s(count: int) -> float:
        return 0.2 + gpu_token * count

    def cpu_s(count: int, is_first: bool) -> float:
        return 0.4 + cpu_token * count + first * is_first

    found = split_s(tokens, gpu_s, cpu_s)
    for size in range(len(tokens) + 1):
        best = min(
            max(
                sum(gpu_s(count) for place, count in enumerate(tokens) if place not in chosen),
                sum(cpu_s(tokens[place], order == 0) for order, place in enumerate(chosen)),
            )
            for chosen in combinations(range(len(tokens)), size)
        )
        assert found[size] <= best + CLOSE
        if len(set(tokens)) < 2:
            assert found[size] == pytest.approx(best)


SECONDS = st.sampled_from([0.0, 0.3, 1.0, 4.0])


@st.composite
def any_costs(draw: st.DrawFn) -> HandCosts:
    names = ("layer_s", "readback_s", "controller_s", "operation_s", "join_s")
    times = {name: draw(st.sampled_from([0.0, 0.1, 1.5])) for name in names}
    parts = {name: draw(SECONDS) for name in ("dense", "cpu_dense", "head", "gpu", "gpu_token", "cpu", "cpu_first")}
    parts["copy"] = draw(st.sampled_from([0.3, 1.0, 4.0]))
    slow = draw(st.sampled_from([{}, {("cpu", "link"): 2.0, ("link", "cpu"): 1.5}]))
    return HandCosts(**parts, slow=slow, host=host(joins_layers=draw(st.booleans()), **times))


@st.composite
def any_system(draw: st.DrawFn) -> SystemSpec:
    """Any combination of policies that needs no trace of its own to be fitted, nor scores."""

    def known(registry: Any) -> list[str]:
        return [name for name, kind in registry.items() if not kind.needs & {"calibration", "scores"}]

    if draw(st.integers(0, 9)) == 0:
        return SystemSpec(evict="static-front", place="static", scope="global", dense_follows=True)
    return SystemSpec(
        evict=draw(st.sampled_from(known(EVICTION))),
        place=draw(st.sampled_from(known(PLACEMENT))),
        prefetch=draw(st.sampled_from([name for name in known(PREFETCH) if PREFETCH[name].depth({}) <= 1])),
        scope=draw(st.sampled_from(["layer", "global"])),
        synchronous=draw(st.booleans()),
        write_back=draw(st.booleans()),
    )


@settings(max_examples=300)
@given(workloads(), any_costs(), any_system(), st.integers(1, 6))
def test_no_run_is_faster_than_its_bound(workload: Workload, costs: HandCosts, system: SystemSpec, slots: int) -> None:
    layers = workload.trace.header.layers
    budget = Budget(slots=slots * layers if system.scope == "global" else slots)
    result = simulate(workload, system, budget, costs, hardware="by hand")
    total = budget.total(layers, system.scope)
    assert_bounded(result, bounds_of(workload, costs, total, dense_follows=system.dense_follows))


@st.composite
def any_profile(draw: st.DrawFn, size_bytes: int) -> Profile:
    """Any times, also such that a small pool is slower; the policies may take time to decide."""

    def points(*sizes: int) -> tuple[Point, ...]:
        return tuple(point(size, draw(SECONDS.filter(bool))) for size in sizes)

    names = ("layer_s", "readback_s", "controller_s", "operation_s")
    own = {"source": "test", **{name: draw(st.sampled_from([0.0, 0.1, 1.5])) for name in names}}
    pool = Pool(slots=draw(st.integers(1, 12)), copies=points(size_bytes), gpu_expert=points(1, 2))
    return profile(
        host=HostSpec(**own, joins_layers=draw(st.booleans()), join_s=0.1),
        copies=points(size_bytes),
        gpu_expert=points(1, 3),
        cpu_expert_first=points(1, 2),
        cpu_expert_later=points(1),
        small_pool=draw(st.sampled_from([None, pool, pool])),
        planning=(Planning(kind="evict", policy="lru", layer_s=draw(SECONDS)),),
        slowdowns=(Slowdown(resource="link", others=("cpu",), factor=1.5),),
        chunk_bytes=draw(st.sampled_from([0, size_bytes // 3])),
    )


def prepared_on(costs: ProfileCosts, workload: Workload, system: SystemSpec, slots: int) -> Prepared:
    """A scenario with so many slots a layer, of which a system that keeps nothing has one in all."""
    header = workload.trace.header
    sizes = {"layers": header.layers, "moe_layers": header.layers, "experts": header.experts, "top_k": header.top_k}
    model = SPEC.model_copy(update=sizes)
    budget = Budget(slots=1 if system.holds != "cache" else slots * (header.layers if system.scope == "global" else 1))
    memory = MemoryPlan.of(model, budget, scope=system.scope, lanes=1, context=9)
    return Prepared(workload, model, system, budget, slots * header.layers, "by hand", costs, None, memory)


@settings(max_examples=200)
@given(st.data(), workloads(), st.one_of(any_system(), st.just(SystemSpec(scope="global", holds="nothing"))))
def test_no_run_on_a_profile_beats_its_bound(data: st.DataObject, workload: Workload, system: SystemSpec) -> None:
    """Small pools, one layer, one expert a token and a single slot among them."""
    if system.dense_follows:
        return
    costs = ProfileCosts(data.draw(any_profile(workload.trace.header.expert_bytes[0])))
    one = prepared_on(costs, workload, system, data.draw(st.integers(1, workload.trace.header.experts)))
    assert_bounded(one.run(events=False, operations=False), lower_bound(one))


def test_a_small_pool_has_the_costs_of_its_run() -> None:
    """Five experts of which the slots hold some; the others are copied, in 5 s each where the run has 3 slots or fewer,
    staging included, and else in 8 s. The last one is followed by 1 s for itself and 1 s for the head."""
    trace = trace_of([[[expert]] for expert in range(5)], experts=8)
    size, slow = trace.header.expert_bytes[0], (point(1, 100.0),)
    pool = Pool(slots=3, copies=(point(size, 5.0),), gpu_expert=(point(1, 1.0),))
    here = profile(copies=(point(size, 8.0),), small_pool=pool, cpu_expert_first=slow, cpu_expert_later=slow)
    shapes = [(SystemSpec(), 1), (SystemSpec(), 2), (SystemSpec(scope="global", holds="nothing"), 2)]
    compared = [prepared_on(ProfileCosts(here), one_at_a_time(trace), *shape) for shape in shapes]
    found = lower_bounds(compared)
    assert [one.run.seconds for one in found] == [4 * 5 + 2, 3 * 8 + 2, 3 * 5 + 2]
    for one, its in zip(compared, found, strict=True):
        assert_bounded(one.run(events=False, operations=False), its)


def test_what_a_policy_takes_to_decide_is_regret() -> None:
    workload = one_at_a_time(trace_of([[[0]]]))
    deciding = (Planning(kind="evict", policy="lru", layer_s=0.5),)
    compared = [
        prepared_on(ProfileCosts(profile(planning=deciding)), workload, SystemSpec(evict=evict), 4)
        for evict in ("lru", "lfu")
    ]
    one, other = lower_bounds(compared)
    assert one == other
    regrets = [regret_of(each.run(events=False, operations=False), one) for each in compared]
    assert regrets[0]["regret_token_s"] == pytest.approx(regrets[1]["regret_token_s"] + 0.5)


def test_more_slots_never_raise_the_bound() -> None:
    trace = trace_of([[list(np.random.default_rng(step).permutation(8)[:3])] for step in range(20)], experts=8)
    found = [bound(trace, slots, HandCosts(copy=3.0, cpu=5.0)).run.seconds for slots in range(1, 9)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_requests_that_arrive_over_time_have_no_bound(tmp_path: Any) -> None:
    (tmp_path / "times.csv").write_text("arrival_s\n3\n")
    requests = schedule_of(trace_of([[[0]]]), BatchSpec(arrivals=str(tmp_path / "times.csv")))
    with pytest.raises(InputError, match=r"arrivals must be left out \(or all be 0\) for a bound"):
        bounds_of(requests, HandCosts(), 1)


@pytest.mark.parametrize("fields", [{}, {"batch": 2}, {"link_gb_per_s": 0.05, "batch": 2}])
def test_no_preset_is_faster_than_its_bound(tmp_path: Path, fields: dict[str, Any]) -> None:
    slow = fields.pop("link_gb_per_s", None)
    prepared = every_preset(tmp_path, hardware_set={"link.gb_per_s": slow} if slow else {}, **fields)
    found = dict(zip(prepared, lower_bounds([*prepared.values()]), strict=True))
    for name, one in prepared.items():
        assert_bounded(one.run(events=False, operations=False), found[name])
    assert found["on-demand"] == found["hybrimoe"]
    assert found["all-resident"].decode.misses == 0 < found["hybrimoe"].decode.misses
    assert found["hybrimoe"] == lower_bound(prepared["hybrimoe"])
    assert found["layer-split"].decode.seconds <= found["hybrimoe"].decode.seconds
    assert found["hybrimoe"].decode.binding == ("link" if slow else "chain")
