"""How a placement's assignment becomes operations, and the time that they take in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.controller import ExpertShape, OffloadController, Predicted
from sim.engine import Engine
from sim.plan import Operation
from sim.policies import PLACEMENT, LayerView, PlacementPolicy
from sim.policies.base import Assignment
from sim.policies.place.split import makespan_s, split
from sim.run import build_controller, run_info
from sim.systems import Budget, SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, workloads
from traces.workload import Routing, Workload, routings


class Scripted(PlacementPolicy):
    """A placement that answers from a list, and keeps the views that it was shown."""

    name = "scripted"
    takes_hits = True

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.answers: list[Assignment] = []
        self.views: list[LayerView] = []

    def place(self, view: LayerView) -> Assignment:
        self.views.append(view)
        return self.answers.pop(0) if self.answers else split(view, ())


class Table:
    """A controller whose placement is scripted, over eight experts a layer, and the rows that its plans come to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int, *, layers: int = 1, **system: Any) -> None:
        monkeypatch.setitem(PLACEMENT, "scripted", Scripted)
        predicted = Predicted(lambda tokens: 1.0, lambda tokens, first: 2.0, 3.0, gpu_free_s=0.5)
        shape = ExpertShape(layers, 8, 4, EXPERT_BYTES)
        spec = SystemSpec(place="scripted", **system)
        self.controller = OffloadController(spec, shape, Budget(slots=slots), predicted)
        script: Any = self.controller._place
        self.script: Scripted = script
        self.steps = 0
        self.expert_of: dict[int, int] = {}

    def plan(self, experts: dict[int, int], *answer: Any, layer: int = 0, ahead: Any = ()) -> list[tuple[Any, ...]]:
        """(op, expert, slot, experts of the operations it waits for) of a layer that is placed as ``answer`` says."""
        self.script.answers = [Assignment(*answer)] if answer else []
        if layer == 0:
            self.controller.begin_step(self.steps)
            self.steps += 1
        loads = sorted(experts.items())
        routing = Routing(tuple([one for one, _ in loads]), tuple([count for _, count in loads]), sum(experts.values()))
        self.last = self.controller.plan_layer(layer, routing, ahead)
        return [self.row(operation) for operation in self.last.operations]

    def row(self, operation: Operation) -> tuple[Any, ...]:
        self.expert_of[operation.id] = operation.expert
        after = tuple([self.expert_of[number] for number in operation.after])
        return operation.op, operation.expert, operation.slot, after


def test_operations_follow_the_order_of_the_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, 4)
    assert table.plan({0: 1, 1: 3, 2: 1, 3: 2}, [2], [3, 0, 1], [0, 1, 3]) == [
        ("cpu", 2, -1, ()),
        ("copy", 0, 0, ()),
        ("copy", 1, 1, ()),
        ("copy", 3, 2, ()),
        ("gpu", 3, 2, (3,)),
        ("gpu", 0, 0, (0,)),
        ("gpu", 1, 1, (1,)),
    ]
    assert table.last[2:] == (7, 4, 0, 0, 0, 4, 1, 3 * EXPERT_BYTES)


def test_a_placement_sees_loads_in_order_and_the_room_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, 4)
    table.plan({0: 1, 5: 1})
    table.plan({5: 2, 7: 1, 0: 2, 3: 4, 1: 1})
    view = table.script.views[-1]
    assert view[:4] == (0, ((0, 2), (5, 2)), ((3, 4), (1, 1), (7, 1)), 2)
    assert (view.late, view.arrivals_s) == ((), ())
    assert (view.copy_s, view.gpu_free_s, view.link_free_s, view.cpu_free_s) == (3.0, 0.5, 0.0, 0.0)


def test_a_resident_expert_on_the_cpu_stays_and_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, 4)
    table.plan({0: 1, 1: 1})
    forgotten: list[int] = []
    monkeypatch.setattr(table.controller._evict, "forget", forgotten.append)
    assert table.plan({0: 1, 1: 1, 2: 1}, [1, 2], [0], []) == [
        ("cpu", 1, -1, ()),
        ("cpu", 2, -1, ()),
        ("gpu", 0, 0, ()),
    ]
    assert (table.last.hits_union, table.last.misses, table.last.cpu_experts, table.last.bytes) == (2, 1, 2, 0)
    assert forgotten == [2]
    assert table.plan({1: 1}) == [("gpu", 1, 1, ())]


def test_a_placement_is_asked_without_misses_only_if_it_takes_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, 4)
    table.plan({0: 1})
    assert table.plan({0: 1}, [0], [], []) == [("cpu", 0, -1, ())]
    monkeypatch.setattr(Scripted, "takes_hits", False)
    assert table.plan({0: 1}, [0], [], []) == [("gpu", 0, 0, ())]
    monkeypatch.setattr(Scripted, "uses_cpu", False)
    deaf = Table(monkeypatch, 4)
    assert deaf.plan({0: 1}, [0], [], []) == [("copy", 0, 0, ()), ("gpu", 0, 0, (0,))]
    assert deaf.script.views == []


def test_a_resident_that_leaves_goes_at_once_if_the_cpu_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 has to leave for 2. Read by the GPU it waits for that; computed from the host's copy it does not."""
    table = Table(monkeypatch, 2)
    table.plan({0: 1, 1: 1})
    assert table.plan({0: 1, 1: 1, 2: 1}, [], [1, 0, 2], [2]) == [
        ("gpu", 1, 1, ()),
        ("gpu", 0, 0, ()),
        ("evict", 0, 0, ()),
        ("copy", 2, 0, (0,)),
        ("gpu", 2, 0, (2,)),
    ]
    table = Table(monkeypatch, 2)
    table.plan({0: 1, 1: 1})
    assert table.plan({0: 1, 1: 1, 2: 1}, [0], [1, 2], [2]) == [
        ("cpu", 0, -1, ()),
        ("evict", 0, 0, ()),
        ("copy", 2, 0, ()),
        ("gpu", 1, 1, ()),
        ("gpu", 2, 0, (2,)),
    ]


def test_what_is_streamed_comes_in_the_order_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, which 4 keeps, and two staging slots. The GPU takes what is there first, wherever it was put."""
    table = Table(monkeypatch, 1)
    rows = table.plan({0: 1, 1: 1, 2: 1, 4: 1}, [], [4, 0, 1, 2], [2, 0, 4, 1])
    assert [row[:3] for row in rows if row[0] == "copy"] == [
        ("copy", 4, 0),
        ("copy", 2, 1),
        ("copy", 0, 2),
        ("copy", 1, 1),
    ]
    assert [row[1] for row in rows if row[0] == "gpu"] == [4, 2, 0, 1]
    rows = table.plan({0: 1, 4: 1}, [], [0, 4], [0])
    assert [row[:2] for row in rows if row[0] == "gpu"] == [("gpu", 4), ("gpu", 0)]


def test_what_is_being_prefetched_is_told_with_its_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of 3 has begun; 5, that layer 1 asks for, comes next, and only then is the link free."""
    table = Table(monkeypatch, 4, layers=2, prefetch="next-router")
    table.plan({0: 1}, ahead=[[(3, 1), (5, 1), (6, 1)]])
    begun, queued, last = (table.controller.next_transfer()[-1] for _ in range(3))
    for operation in (begun, queued, last):
        table.row(operation)
    rows = table.plan({5: 2, 6: 1, 7: 1}, [5], [7, 6], [7], layer=1)
    view = table.script.views[-1]
    assert (view.hits, view.late, view.misses) == ((), ((5, 2), (6, 1)), ((7, 1),))
    assert (view.arrivals_s, view.link_free_s) == ((6.0, 9.0), 9.0)
    # the CPU takes 5 while its copy goes on, into the slot that it keeps
    assert [row[:2] for row in rows] == [("cpu", 5), ("copy", 7), ("gpu", 7), ("gpu", 6)]
    assert rows[-1] == ("gpu", 6, last.slot, (6,))
    assert (table.last.late_hits, table.last.misses, table.last.cpu_experts) == (2, 1, 1)
    table.controller.on_arrival(begun)
    table.controller.on_arrival(queued)
    table.plan({0: 1})
    table.plan({5: 1, 6: 1}, layer=1)
    assert (table.script.views[-1].hits, table.script.views[-1].late) == (((5, 1),), ((6, 1),))
    assert table.script.views[-1].arrivals_s == (3.0,)


def test_fallbacks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, 4)
    table.plan({0: 1}, [0], [], [], True)
    table.plan({0: 1}, [0], [], [])
    table.plan({0: 1}, [0], [], [], True)
    assert table.controller.fallbacks == 2


@pytest.mark.parametrize("place", [name for name in PLACEMENT if PLACEMENT[name].takes_hits])
@settings(max_examples=30)
@given(workloads(), st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([0.4, 1.0, 3.0]), st.sampled_from([0.0, 0.8]))
def test_a_simulated_layer_takes_as_long_as_its_placement_expected(
    place: str, workload: Workload, copy_s: float, cpu_s: float, first_s: float
) -> None:
    """Where everything fits, nothing is prefetched, and the host takes no time."""
    costs = HandCosts(gpu=0.7, gpu_token=0.1, copy=copy_s, cpu=cpu_s, cpu_first=first_s)
    controller = build_controller(workload, SystemSpec(place=place), Budget(slots=workload.trace.header.experts), costs)
    decide, expected_s = controller._place.place, list[float]()

    def noted(view: LayerView) -> Assignment:
        expected_s.append(makespan_s(view, decide(view)))
        return decide(view)

    controller._place.place = noted  # type: ignore[method-assign]
    engine = Engine(controller, costs)
    engine.run(workload.steps, lambda step: routings(workload.trace, step), lambda step: ())
    layers = engine.log.result(run_info("simulated", workload, controller, hardware="by hand")).layers
    taken_s = layers["end_s"] - layers["start_s"] - layers["dense_s"]
    np.testing.assert_allclose(taken_s, expected_s, atol=1e-9)
