"""What the controller decides below the device: what host memory holds, what is saved there, layers on the CPU."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.controller import OffloadController
from sim.costs import RooflineCosts
from sim.engine import Engine
from sim.host_memory import HostMemory
from sim.logs import RunLog
from sim.plan import CPU, EVICT, READ, Operation
from sim.policies import EVICTION, PLACEMENT, PREFETCH
from sim.run import build_controller
from sim.systems import Budget, SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, run, trace_of, workloads
from tests.sim.test_costs import MODEL, machine
from traces.errors import InputError
from traces.schema import Trace
from traces.workload import Workload, one_at_a_time, routings


def operations_of(trace: Trace, slots: int, **given: Any) -> list[tuple[str, int]]:
    rows = run(trace, slots, **given).operations
    return [*zip(rows["op"], rows["expert"], strict=True)]


def controller_of(trace: Trace, slots: int, host_slots: int | None = None, **system: Any) -> OffloadController:
    budget = Budget(slots=slots, host_slots=host_slots)
    return build_controller(one_at_a_time(trace), SystemSpec(**system), budget, HandCosts())


def plan_of(controller: OffloadController, trace: Trace, layer: int = 0) -> list[Operation]:
    (step,) = one_at_a_time(trace)
    controller.begin_step(0)
    return controller.plan_layer(layer, routings(trace, step)[layer]).operations


# Host memory, with the lowest experts in it at the beginning, above a disk.


def test_what_memory_lacks_is_read_before_it_is_copied() -> None:
    trace = trace_of([[[0]], [[2]], [[1]], [[0]]])
    steps = [
        [("copy", 0), ("gpu", 0)],
        [("evict", 0), ("read", 2), ("copy", 2), ("gpu", 2)],  # pushes out 1, of which nobody made use
        [("evict", 2), ("read", 1), ("copy", 1), ("gpu", 1)],
        [("evict", 1), ("read", 0), ("copy", 0), ("gpu", 0)],
    ]
    assert operations_of(trace, 1, host_slots=2) == [one for step in steps for one in step]


def test_a_copy_on_the_device_does_not_keep_the_one_in_memory() -> None:
    trace = trace_of([[[0]], [[2]], [[3]], [[0]]])
    operations = operations_of(trace, 3, host_slots=2)
    assert operations[:2] == [("copy", 0), ("gpu", 0)]
    assert operations[-4:] == [("read", 3), ("copy", 3), ("gpu", 3), ("gpu", 0)]


def test_the_cpu_too_reads_from_the_disk_what_memory_lacks() -> None:
    trace = trace_of([[[3]], [[2]], [[3]]])
    steps = [[("read", 3), ("cpu", 3)], [("read", 2), ("cpu", 2)], [("cpu", 3)]]
    operations = operations_of(trace, 1, host_slots=2, place="static", evict="static-uniform")
    assert operations[-5:] == [one for step in steps for one in step]


def test_an_expert_that_was_used_stays_longer() -> None:
    trace = trace_of([[[0]], [[2]], [[0]], [[3]], [[0]]])
    reads = [expert for op, expert in operations_of(trace, 1, host_slots=2) if op == READ]
    assert reads == [2, 3]


@pytest.mark.parametrize("host_slots", [None, 4, 99])
def test_memory_that_holds_all_reads_nothing(host_slots: int | None) -> None:
    trace = trace_of([[[0]], [[3]], [[2]]])
    assert operations_of(trace, 1, host_slots=host_slots) == operations_of(trace, 1)
    assert not controller_of(trace, 1, host_slots).reads_disk


def test_a_room_is_not_written_while_it_is_being_read() -> None:
    trace = trace_of([[[1, 2]]])
    plan = plan_of(controller_of(trace, 2, host_slots=1), trace)
    read_1, copy_1, read_2, copy_2 = plan[:4]
    assert [one.op for one in plan] == ["read", "copy", "read", "copy", "gpu", "gpu"]
    assert (read_1.after, copy_1.after) == ((), (read_1.id,))
    assert read_2.after == (read_1.id, copy_1.id)
    assert copy_2.after == (read_2.id,)
    assert (read_1.bytes, read_1.slot) == (EXPERT_BYTES, -1)


def test_a_room_waits_for_all_that_is_done_with_it() -> None:
    memory = HostMemory(2)
    memory.note(0, CPU, 5)
    memory.note(0, "copy", 6)
    memory.note(0, CPU, 7)
    assert memory.arrival(1) == ()
    assert memory.admit(9, 8) == (7, 6), "0 leaves, for 1 has been used"
    assert memory.arrival(9) == (8,)
    assert memory.arrival(0) is None


def test_a_machine_without_a_disk_is_told() -> None:
    controller = controller_of(trace_of([[[0]]]), 1, host_slots=2)
    with pytest.raises(InputError, match="hardware must have a disk to read experts from, got by hand"):
        Engine(controller, RooflineCosts(MODEL, machine()))


UNFITTED = [[name for name, kind in kinds.items() if "calibration" not in kind.needs] for kinds in (EVICTION, PREFETCH)]


@settings(max_examples=80)
@given(
    workloads(),
    st.integers(1, 5),
    st.integers(1, 12),
    st.fixed_dictionaries(
        {
            "evict": st.sampled_from(UNFITTED[0]),
            "prefetch": st.sampled_from(UNFITTED[1]),
            "place": st.sampled_from([*PLACEMENT]),
            "scope": st.sampled_from(["layer", "global"]),
            "write_back": st.booleans(),
        }
    ),
)
def test_nothing_is_used_that_memory_does_not_hold(
    workload: Workload, slots: int, host_slots: int, system: dict[str, Any]
) -> None:
    header = workload.trace.header
    blocks = header.layers * header.experts
    with patch.object(RunLog, "withdrawn"):  # a prefetch uses memory when it is decided
        operations = run(workload, slots, host_slots=host_slots, **system).operations
    held = OrderedDict.fromkeys(range(min(host_slots, blocks)))
    for row in operations.itertuples(index=False):
        block = row.layer * header.experts + row.expert
        if row.op == READ or (row.op == EVICT and row.bytes and block not in held):
            assert block not in held
            held.popitem(last=False)
            held[block] = None
        elif row.op in ("copy", CPU):
            held.move_to_end(block)  # KeyError: it is not there
    assert len(held) == min(host_slots, blocks)


# Write-backs.


def test_what_is_written_back_is_in_memory_again() -> None:
    trace = trace_of([[[0]], [[2]], [[3]], [[2]]])
    reads = [row for row in operations_of(trace, 1, host_slots=1, write_back=True) if row[0] == READ]
    assert reads == [("read", 2), ("read", 3), ("read", 2)]
    more = [row for row in operations_of(trace, 1, host_slots=2, write_back=True) if row[0] == READ]
    assert more == [("read", 2), ("read", 3)]


def test_a_copy_waits_for_the_write_back_from_its_slot() -> None:
    trace = trace_of([[[0]], [[1]]])
    controller = controller_of(trace, 1, write_back=True)
    first, second = one_at_a_time(trace)
    controller.begin_step(0)
    controller.plan_layer(0, routings(trace, first)[0])
    controller.begin_step(1)
    evict, copy, _ = controller.plan_layer(0, routings(trace, second)[0]).operations
    assert (evict.op, evict.bytes, evict.slot) == (EVICT, EXPERT_BYTES, copy.slot)
    assert copy.after == (evict.id,)


@pytest.mark.parametrize("write_back", [False, True])
def test_write_backs_decide_nothing(write_back: bool) -> None:
    trace = trace_of([[[0, 1]], [[2, 3]], [[0, 3]]])
    plain, saving = run(trace, 2).operations, run(trace, 2, write_back=write_back).operations
    pd.testing.assert_frame_equal(plain.drop(columns="bytes"), saving.drop(columns="bytes"))
    assert (saving[saving["op"] == EVICT]["bytes"] == write_back * EXPERT_BYTES).all()


# Dense work that follows the experts.


def test_a_layer_that_is_not_preloaded_as_a_whole_runs_on_the_cpu() -> None:
    trace = trace_of([[[0], [0], [3], [2]]])
    system = {"evict": "static-front", "place": "fetch", "scope": "global", "dense_follows": True}
    controller = controller_of(trace, 7, **system)
    assert controller.layers_on_cpu == frozenset()
    controller.preload()
    assert controller.layers_on_cpu == {1, 2, 3}, "seven slots hold the first layer, and the second as a part only"
    result = run(trace, 7, **system)
    assert [*result.layers["cpu_experts"]] == [0, 1, 1, 1], "whatever the placement says"
    dense = result.events[result.events["kind"] == "dense"].sort_values("layer")
    assert [*dense["resource"]] == ["gpu", "cpu", "cpu", "cpu"]


def test_dense_work_stays_on_the_gpu_unless_asked() -> None:
    trace = trace_of([[[0], [0]]])
    controller = controller_of(trace, 4, evict="static-front", place="static", scope="global")
    controller.preload()
    assert controller.layers_on_cpu == frozenset()
