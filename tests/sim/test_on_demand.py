"""A system that keeps nothing: every use is a copy through the staging slots, on whatever trace."""

from __future__ import annotations

import pytest
from hypothesis import given

from sim.plan import COPY, EVICT
from sim.policies import EVICTION
from sim.presets import preset
from sim.systems import Budget
from tests.sim.formulas import FEW
from tests.sim.hand import EXPERT_BYTES, run, trace_of, workloads
from traces.workload import Workload

ON_DEMAND = preset("on-demand").system.model_dump()


def test_it_is_given_no_slot() -> None:
    assert preset("on-demand").budget(Budget(slots=40), layers=10, experts=8) == Budget(slots=0)


def test_an_expert_that_was_just_used_is_fetched_again() -> None:
    """One layer, the same expert in every pass."""
    result = run(trace_of([[[2]], [[2]], [[2]]]), 0, **ON_DEMAND)
    assert result.layers.hits_union.tolist() == [0, 0, 0]
    assert (result.operations.op == COPY).sum() == 3
    assert result.info.capacity_slots == result.info.capacity_bytes == 0
    assert result.headline()["misses_fetched"] == 3, "the size of an expert is told, although none is held"
    silent = result.info.model_copy(update={"expert_bytes": 0})
    assert silent.bytes_of_expert == 0
    assert silent.model_copy(update={"capacity_slots": 4, "capacity_bytes": 400}).bytes_of_expert == 100


@FEW
@given(workload=workloads())
def test_no_use_is_ever_a_hit(workload: Workload) -> None:
    result = run(workload, 0, **ON_DEMAND)
    layers = result.layers
    assert layers[["hits_union", "hits_assignments", "late_hits", "cpu_experts"]].sum().sum() == 0
    assert (layers.misses == layers.union).all()
    assert (layers.bytes == layers.union * EXPERT_BYTES).all()
    assert EVICT not in set(result.operations.op), "what was not kept does not leave"
    assert set(result.operations[result.operations.op == COPY].slot) <= {0, 1}, "the staging slots"


@pytest.mark.parametrize("name", [name for name in EVICTION if not EVICTION[name].needs])
def test_without_slots_no_policy_keeps_anything(name: str) -> None:
    trace = trace_of([[[0, 1], [1]], [[0, 2], [1]], [[1, 2], [1]]])
    for fields in ({"scope": "global", "holds": "nothing"}, {}):
        result = run(trace, 0, evict=name, **fields)
        assert result.layers.hits_union.sum() == 0
        assert (result.operations.op == COPY).sum() == result.layers.union.sum()
