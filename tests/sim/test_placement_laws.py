"""The laws that every placement keeps, and how near HybriMoE's rule is to the optimum."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placements import ratios
from sim.policies import PLACEMENT, LayerView, PolicyContext
from sim.policies.base import Assignment
from sim.policies.place import HybriMoe
from sim.policies.place.hybrimoe import assignment_of
from sim.policies.place.optimal import _low_loads
from sim.policies.place.split import Scheduled, makespan_s, split
from tests.sim.layers import SCHEDULED, hybrimoe, layers, optimal, policy, view


@pytest.mark.parametrize("name", list(PLACEMENT))
@given(layers(most=9))
def test_an_assignment_splits_the_layer(name: str, layer: LayerView) -> None:
    placed = policy(name).place(layer)
    experts = [expert for part in (layer.hits, layer.late, layer.misses) for expert, _ in part]
    assert sorted([*placed.cpu, *placed.gpu]) == sorted(experts)
    missing = {expert for expert, _ in layer.misses}
    assert sorted(placed.copies) == sorted(missing.intersection(placed.gpu))
    if not PLACEMENT[name].takes_hits:
        assert missing.issuperset(placed.cpu)
    if not PLACEMENT[name].uses_cpu:
        assert [*placed.cpu] == []


@pytest.mark.parametrize("name", list(PLACEMENT))
@settings(max_examples=50)
@given(layers(most=5))
def test_nobody_ends_before_the_optimum(name: str, layer: LayerView) -> None:
    assert makespan_s(layer, policy(name).place(layer)) >= makespan_s(layer, optimal().place(layer)) - 1e-9


@settings(max_examples=60)
@given(layers(most=4))
def test_the_optimum_is_that_of_all_assignments_in_all_orders(layer: LayerView) -> None:
    loads = [*layer.hits, *layer.late, *layer.misses]
    missing = {expert for expert, _ in layer.misses}
    best = min(
        makespan_s(layer, Assignment(order[:count], gpu, [expert for expert in gpu if expert in missing]))
        for order in permutations(expert for expert, _ in loads)
        for count in range(len(loads) + 1)
        for gpu in [order[count:]]
    )
    assert makespan_s(layer, optimal().place(layer)) == pytest.approx(best)


@settings(max_examples=200)
@given(layers(most=8), st.sampled_from(["head", "ready-first"]), st.booleans())
def test_hybrimoe_is_never_slower_than_one_device_alone(layer: LayerView, order: str, takes: bool) -> None:
    experts = [expert for part in (layer.hits, layer.late, layer.misses) for expert, _ in part]
    placed = hybrimoe(gpu_order=order, cpu_takes_transfers=takes).place(layer)
    assert makespan_s(layer, placed) <= makespan_s(layer, split(layer, ())) + 1e-9
    assert makespan_s(layer, placed) <= makespan_s(layer, split(layer, experts)) + 1e-9


@settings(max_examples=200)
@given(layers(most=8), st.sampled_from(["head", "ready-first"]))
def test_the_clocks_of_the_walk_are_those_of_its_assignment(layer: LayerView, order: str) -> None:
    moves = hybrimoe(gpu_order=order).moves(layer)
    ends = [move.end_s for move in moves if move.timeline != "link"]
    assignment = assignment_of(moves)
    end_s = max([layer.gpu_free_s, *ends])
    if len(assignment.copies) == sum(move.timeline == "link" for move in moves):
        assert makespan_s(layer, assignment) == pytest.approx(end_s)
    else:  # a copy that turned out to be useless is not made, and those after it come sooner
        assert makespan_s(layer, assignment) <= end_s + 1e-9


@pytest.mark.parametrize("name", SCHEDULED)
@given(layers(most=8))
def test_a_case_that_is_remembered_is_decided_as_if_it_were_new(name: str, layer: LayerView) -> None:
    """The names of experts matter where loads are equal, and then only by their order."""
    kept = policy(name)
    assert isinstance(kept, Scheduled)
    assert kept.place_timed(layer) == kept.schedule(layer)
    renamed = {expert: 2 * expert + 5 for part in (layer.hits, layer.late, layer.misses) for expert, _ in part}
    other = layer._replace(
        layer=7, **{part: [(renamed[one], n) for one, n in getattr(layer, part)] for part in ("hits", "late", "misses")}
    )
    assert kept.place_timed(other) == kept.schedule(other)


def test_the_optimum_of_many_experts_does_not_wait_for_what_the_cpu_can_compute() -> None:
    """Nine are there, and the tenth would come after ten copies: the CPU ends it after one second."""
    layer = view({expert: 1 for expert in range(9)}, late={9: 1}, gpu=0.1, cpu=1.0, copy=10.0)
    placed = optimal().place(layer)
    assert [*placed.cpu] == [9]
    assert makespan_s(layer, placed) == pytest.approx(1.0)


@settings(max_examples=60)
@given(layers(most=8))
def test_with_equal_loads_the_many_experts_search_is_as_good_as_that_of_all_sets(layer: LayerView) -> None:
    parts = ("hits", "late", "misses")
    same = layer._replace(**{part: [(one, 1) for one, _ in getattr(layer, part)] for part in parts})
    few = min(makespan_s(same, split(same, cpu)) for cpu in _low_loads(same))
    assert few == pytest.approx(makespan_s(same, optimal().place(same)))


def test_a_case_is_decided_once() -> None:
    class Counting(HybriMoe):
        decided = 0

        def schedule(self, view: LayerView) -> tuple[Assignment, float]:
            self.decided += 1
            return super().schedule(view)

    kept = Counting(PolicyContext(1, 64, 6))
    layer = view({1: 2, 2: 1}, {3: 1})
    kept.place(layer)
    kept.place(layer._replace(hits=((8, 2), (10, 1)), misses=((11, 1),), layer=3, free_slots=2))
    assert kept.decided == 1
    kept.place(layer._replace(misses=((0, 1),)))  # among equal loads the miss now comes before the hit
    kept.place(layer._replace(misses=((3, 2),)))
    kept.place(layer._replace(copy_s=2.0))
    assert kept.decided == 4


# How good the rule is.


@pytest.mark.parametrize("most_tokens", [1, 8])
@pytest.mark.parametrize("count", [6, 8])
def test_hybrimoe_without_its_fallback_is_near_the_optimum(count: int, most_tokens: int) -> None:
    found = ratios(count, most_tokens)
    assert min(found) >= 1 - 1e-9
    assert np.mean(found) <= 1.02
