"""Resident experts that are computed together: the same outputs and the same log as one by one, in fewer calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from real import fit, grouped
from real.cpu_device import CpuDevice
from real.decode import Machine, decode
from real.device import Work, open_device
from real.executor import Executor
from real.grouped import FEWEST, MOST_ROWS, MOST_SLOTS, Together, together
from real.kernels import Kernel, kernel_for
from real.models.load import load_spec
from real.packing import packing_of
from real.store import DeviceSlots, SlotError
from real.timing import spans
from sim.plan import COPY, CPU, GPU, Operation
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, NO_CUDA, PROMPTS, assert_near, decoded, forced, machine_on, own_model
from tests.real.test_races import FORCED, JITTER, LATE_READS, Jittery, Pauses, is_wrong, wanted, workload

FOUR = [*PROMPTS, [44, 60, 7]]
NEW_TOKENS = 5
SYSTEMS: dict[str, tuple[int, dict[str, Any]]] = {
    "all resident": (8, {}),
    "some missing": (4, {"evict": "lfu"}),
    "more than slots": (2, {}),
    "some on the CPU": (4, {"place": "cpu-on-miss"}),
    "one pool": (16, {"scope": "global", "write_back": True}),
}
CALLS = 11
"""To torch, for any number of experts; one alone takes five. On a GPU it is one more, which sends the offsets there."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_on("cpu") as machine:
        machine.grouped = True
        yield machine


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each group of the test has had."""
    seen: list[int] = []
    run = Kernel.run_together

    def noted(kernel: Kernel, operations: Sequence[Operation], *rest: Any) -> None:
        seen.append(len(operations))
        run(kernel, operations, *rest)

    monkeypatch.setattr(Kernel, "run_together", noted)
    return seen


def bf16_machine(device: CpuDevice) -> Machine:
    loaded = load_spec(tiny.SPECS["qwen3_moe"], model_type="qwen3_moe", with_experts=True, seed=3, dtype="bf16")
    return Machine.prepare(loaded, device)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("name", SYSTEMS)
def test_outputs_and_log_are_those_of_one_by_one(machine: Machine, sizes: list[int], name: str, lanes: int) -> None:
    slots, system = SYSTEMS[name]
    run = decoded(machine, FOUR[:lanes], NEW_TOKENS, slots, **system)
    assert sizes, "nothing was computed together"
    sizes.clear()
    machine.grouped = False
    single = decoded(machine, FOUR[:lanes], NEW_TOKENS, slots, **system)
    assert not sizes
    assert run.executor.notes == single.executor.notes == []
    assert run.tokens == single.tokens
    assert_near(run.logits, single.logits)
    assert run.operations.equals(single.operations)


def test_every_resident_expert_of_a_prompt_is_in_one_group(machine: Machine, sizes: list[int]) -> None:
    run = decoded(machine, FOUR, NEW_TOKENS, 8)
    at_once = (
        run.operations[run.operations.op == GPU].groupby(["step", "layer"]).size()
        - run.layers.set_index(["step", "layer"]).misses
    )
    assert sizes == [count for count in at_once if count > 1]
    assert max(sizes) > 3


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v2", "olmoe"])
def test_other_families_give_the_same(model_type: str, prefetch: str, sizes: list[int]) -> None:
    with machine_on("cpu", model_type) as machine:
        machine.grouped = True
        run = decoded(machine, PROMPTS, NEW_TOKENS, 6, prefetch=prefetch)
        assert sizes
        machine.grouped = False
        assert_near(run.logits, decoded(machine, PROMPTS, NEW_TOKENS, 6, prefetch=prefetch).logits)


def test_bf16_is_within_its_tolerance(sizes: list[int]) -> None:
    with CpuDevice() as device:
        machine = bf16_machine(device)
        runs = []
        for machine.grouped in (True, False):
            runs.append(forced(machine, workload("qwen3_moe", 3), PROMPTS, FORCED, 8))
    assert sizes
    assert_near(runs[0].logits, runs[1].logits, 5e-2)


def test_one_operation_at_a_time_is_one_by_one(machine: Machine, sizes: list[int]) -> None:
    decoded(machine, PROMPTS, 2, 8, synchronous=True)
    assert not sizes


@pytest.mark.parametrize("seed", range(6))
def test_no_delay_changes_what_comes_out(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    system: dict[str, Any] = {"prefetch": str(rng.choice(["none", "next-router"])), "write_back": bool(seed % 2)}
    system["place"] = ("fetch", "cpu-on-miss")[seed % 3 == 2]
    with Jittery(seed, JITTER) as device:
        assert_near(together_logits(device, int(rng.integers(2, 6)), **system), wanted("qwen3_moe", 3))
    assert sizes


def together_logits(device: CpuDevice, slots: int, **system: Any) -> list[torch.Tensor]:
    machine = Machine.prepare(own_model(), device)
    machine.grouped = True
    return forced(machine, workload("qwen3_moe", 3), PROMPTS, FORCED, slots, **system).logits


SLOW_GROUPS: Pauses = {**LATE_READS, "gpu": (2e-3, 3e-3)}


def test_a_copy_that_does_not_wait_for_the_group_is_found() -> None:
    for careless in ("", "copy"):
        with Jittery(5, SLOW_GROUPS, careless) as device:
            assert is_wrong(partial(together_logits, device, 4), wanted("qwen3_moe", 3)) == bool(careless)


def test_a_group_stands_for_each_of_its_experts(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    start, seen = Executor._start_together, list[bool]()

    def noted(executor: Executor, group: Sequence[Operation], kernel: Kernel) -> Work:
        work = start(executor, group, kernel)
        seen.extend(executor._works[one.id] is executor._reads[one.slot] is work for one in group)
        return work

    monkeypatch.setattr(Executor, "_start_together", noted)
    decoded(machine, FOUR, NEW_TOKENS, 4)
    assert len(seen) > 3
    assert all(seen), "what copies to the slot would not wait for the read"


def broken(*arguments: Any, **options: Any) -> torch.Tensor:
    raise RuntimeError("no kernel for this\nand more")


def shifted(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return RIGHT(rows, weights.roll(1, 0), offs=offs)


def nan(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return RIGHT(rows, weights, offs=offs) * float("nan")


RIGHT = functional.grouped_mm


@pytest.mark.parametrize(
    ("product", "told"),
    [(broken, "failed (no kernel for this)"), (shifted, "gave outputs that differ by "), (nan, "differ by nan")],
)
def test_a_product_that_fails_or_differs_leaves_the_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, sizes: list[int], product: Any, told: str
) -> None:
    monkeypatch.setattr(functional, "grouped_mm", product)
    runs = {}
    for machine.grouped in (True, False):
        run, _, tokens = decode(
            machine, FOUR, SystemSpec(), Budget(slots=8), COSTS, max_new_tokens=2, full_trace=False, batch=4
        )
        runs[machine.grouped] = run, tokens
    assert not sizes
    assert runs[True][1] == runs[False][1]
    assert runs[False][0].info.notes == []
    (note,) = runs[True][0].info.notes
    assert note.startswith("experts were computed one by one: together they ")
    assert told in note


def test_the_trial_leaves_empty_slots(machine: Machine) -> None:
    slots = machine.slots(20)
    way, notes = together(machine.store, slots, machine.device, True)
    assert way is not None
    assert notes == []
    for slot in range(20):
        with pytest.raises(SlotError):
            slots.read(slot, 0, slot % 8)


class Gpu:
    """A device of which only the place is asked."""

    torch_device = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "used"),
    [
        ((9, 0), "bf16", True),
        ((10, 0), "bf16", True),
        ((8, 0), "bf16", False),
        ((12, 0), "bf16", False),
        ((9, 0), "fp32", False),
    ],
)
def test_it_is_used_where_cuda_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, used: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    monkeypatch.setattr(Together, "objection", lambda way: "")
    with CpuDevice() as device:
        machine = bf16_machine(device) if dtype == "bf16" else Machine.prepare(own_model(), device)
        way, notes = together(machine.store, machine.slots(4), Gpu())  # type: ignore[arg-type]
        assert (way is not None) == used
        assert together(machine.store, machine.slots(4), device) == (None, [])
        assert together(machine.store, machine.slots(4), Gpu(), False) == (None, [])  # type: ignore[arg-type]
        assert together(machine.store, machine.slots(1), device, True) == (None, [])
    assert notes == []


def test_forms_that_cannot_be_computed_together_are_not() -> None:
    with machine_on("cpu", "gpt_oss") as machine:
        assert together(machine.store, machine.slots(4), machine.device, True) == (None, [])
    with machine_on("cpu") as machine:
        form = machine.store.form
    assert form.run_together is not None
    assert packing_of(form, torch.float32, "int8").form.run_together is None


def test_matrices_whose_rows_are_not_aligned_are_not_tried(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(grouped, "ALIGNED_BYTES", 256)
    assert together(machine.store, machine.slots(4), machine.device, True) == (None, [])


def gpu_operation(slot: int, tokens: int = 1, after: tuple[int, ...] = ()) -> Operation:
    return Operation(slot, GPU, 0, slot, slot, tokens, 0, after)


def test_what_is_computed_together(machine: Machine) -> None:
    way = Together(machine.store, machine.slots(4), machine.device.torch_device)
    low, mid, high = (gpu_operation(slot) for slot in (2, 5, 9))
    others = [Operation(20, COPY, 0, 3, 3, 0, 96), Operation(21, CPU, 0, 4, -1, 1, 0), gpu_operation(3, after=(20,))]
    assert way.among([high, *others, low, mid]) == [low, mid, high]
    assert FEWEST == 3
    assert way.among([high, low, *others]) == []
    assert way.among([low, mid, gpu_operation(9, MOST_ROWS - 2)]) != []
    assert way.among([low, mid, gpu_operation(9, MOST_ROWS - 1)]) == []
    assert way.among([low, mid, gpu_operation(2 + MOST_SLOTS - 1)]) != []
    assert way.among([low, mid, gpu_operation(2 + MOST_SLOTS)]) == []


def test_a_slot_that_holds_another_expert_is_not_read(machine: Machine) -> None:
    slots = machine.slots(4)
    for slot in range(3):
        slots.load(slot, 1, slot)
    gate_up, down = slots.read_together([(0, 1, 0), (2, 1, 2)])
    assert gate_up.shape == (3, 32, 32)
    assert down.shape == (3, 16, 32)
    assert torch.equal(gate_up[2].mT, slots.read(2, 1, 2)[0])
    with pytest.raises(SlotError, match="slot 2 must hold expert 3 of layer 1, it holds"):
        slots.read_together([(0, 1, 0), (2, 1, 3)])
    pool = slots._buffer
    assert gate_up.data_ptr() == pool.data_ptr(), "the pool was copied"
    slots.release()
    assert slots._pool == ()


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("experts", [FEWEST, 6])
@pytest.mark.parametrize("tokens", [1, 4])
def test_it_takes_no_more_calls_than_one_by_one(machine: Machine, experts: int, tokens: int) -> None:
    slots = machine.slots(8)
    for slot in range(8):
        slots.load(slot, 0, slot)
    way = Together(machine.store, slots, machine.device.torch_device)
    chosen = [gpu_operation(slot, tokens) for slot in range(experts)]
    ids = torch.arange(experts).repeat(tokens, 1)
    counts = []
    with torch.inference_mode():
        for how in ("together", "one by one"):
            kernel = kernel_for(
                partial(single, machine, slots), torch.ones(tokens, 32), ids, torch.ones(tokens, experts)
            )
            with Calls() as calls:
                if how == "together":
                    kernel.run_together(chosen, way.compute)
                else:
                    for operation in chosen:
                        kernel.run(operation)
            counts.append(calls.count)
    assert counts == [CALLS, 5 * experts]


def single(machine: Machine, slots: DeviceSlots, operation: Operation, rows: torch.Tensor) -> torch.Tensor:
    return machine.store.form.run(slots.read(operation.slot, operation.layer, operation.expert), rows)


def work(resource: str, start_s: float, end_s: float) -> Work:
    done = Work(resource, lambda: None)
    done.start_s, done.end_s = start_s, end_s
    return done


def test_a_groups_time_is_shared_out_evenly() -> None:
    group, alone, copy = work("gpu", 2.0, 5.0), work("gpu", 5.5, 6.0), work("link", 1.0, 5.25)
    a, b, c, d = (gpu_operation(slot) for slot in range(4))
    brought = Operation(9, COPY, 0, 3, 3, 0, 96)
    assert [*spans([(brought, copy), (a, group), (b, group), (c, group), (d, alone)])] == [
        (brought, "link", 1.0, 5.25),
        (a, "gpu", 2.0, 3.0),
        (b, "gpu", 3.0, 4.0),
        (c, "gpu", 4.0, 5.0),
        (d, "gpu", 5.5, 6.0),
    ]


def test_calibration_reads_a_piece_for_every_expert(machine: Machine, sizes: list[int]) -> None:
    run, *_ = decode(machine, FOUR, SystemSpec(), Budget(slots=8), COSTS, max_new_tokens=3, full_trace=False)
    assert sizes
    rows = fit.pieces(run)
    on_gpu, computed = rows[rows.resource == "gpu"], run.operations[run.operations.op == GPU]
    keys = ["step", "layer", "expert"]
    assert sorted(map(tuple, on_gpu[keys].to_numpy())) == sorted(map(tuple, computed[keys].to_numpy()))
    assert (on_gpu.seconds > 0).all()
    by_layer = run.events[(run.events.resource == "gpu") & (run.events.kind == "expert")]
    seconds = (by_layer.end_s - by_layer.start_s).groupby([by_layer.step, by_layer.layer]).sum()
    assert np.allclose(seconds, run.layers.set_index(["step", "layer"]).gpu_experts_s, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_on_a_gpu_it_is_used_by_itself(sizes: list[int]) -> None:
    if torch.cuda.get_device_capability()[0] not in grouped.GOOD_ON:
        pytest.skip("needs a GPU with a kernel for groups")
    with open_device("cuda") as device:
        machine = bf16_machine(device)  # type: ignore[arg-type]
        run = forced(machine, workload("qwen3_moe", 3), PROMPTS, FORCED, 8)
        assert run.executor.notes == []
        assert sizes
        machine.grouped = False
        assert_near(run.logits, forced(machine, workload("qwen3_moe", 3), PROMPTS, FORCED, 8).logits, 5e-2)
