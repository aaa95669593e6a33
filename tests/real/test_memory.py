"""The memory of a run: what is planned, refused and measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import moetwin
from real import memory
from real.decode import Machine, decode
from real.device import open_device
from real.jobs import Limits, Size
from real.models.load import load_spec
from real.store import DeviceSlots
from sim.memory import MemoryPlan
from sim.spec import ModelSpec, catalogue
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, PROMPTS, machine_on, own_model
from traces.errors import InputError

OLMOE = catalogue.model("olmoe-1b-7b")
SIZE = Size(lanes=1, rows=128, context=192)


def limits(**given: Any) -> Limits:
    return Limits(**{"batch": 1, "cache": None, "gpu_memory": None, "calibration": None, **given})


def preset(**system: Any) -> Any:
    from sim.presets import Preset

    return Preset(system=SystemSpec(**system))


def test_a_plan_adds_up_and_fits_the_memory_that_was_given() -> None:
    budget, plan = limits(gpu_memory="4GiB", device="cuda").budget(preset(), OLMOE, SIZE)
    assert plan.total_bytes <= 4 << 30
    assert plan.total_bytes + OLMOE.moe_layers * OLMOE.expert_bytes > 4 << 30, "one slot more a layer would not fit"
    assert plan.experts_bytes == budget.slots * OLMOE.moe_layers * OLMOE.expert_bytes
    assert plan.kv_bytes == 192 * OLMOE.kv_bytes_per_token
    assert plan.workspace_bytes == memory.workspace_bytes(OLMOE, lanes=1, rows=128, context=192, gpu=True)
    assert plan.told().startswith(f"{plan.total_bytes / 1e9:.2f} GB = {OLMOE.dense_bytes / 1e9:.2f} dense + ")


def test_a_longer_context_takes_the_place_of_experts() -> None:
    plans = [limits(gpu_memory="4GiB", context=context).budget(preset(), OLMOE, SIZE)[1] for context in (192, 4096)]
    assert plans[1].kv_bytes == 4096 * OLMOE.kv_bytes_per_token > plans[0].kv_bytes
    assert plans[1].experts_bytes < plans[0].experts_bytes
    with pytest.raises(InputError, match="context must be at least the 192 tokens of a sequence, got 191"):
        limits(context=191).budget(preset(), OLMOE, SIZE)


def test_a_gpu_tells_what_is_taken_beyond_what_torch_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"max_memory_allocated": 5, "max_memory_reserved": 7, "memory_reserved": 6, "mem_get_info": (80, 100)}
    for name, value in taken.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found = memory.peak(torch.device("cuda"))
    found.pop("host_resident_bytes")
    assert found == {"device_allocated_bytes": 5, "device_reserved_bytes": 7, "device_context_bytes": 14}


def test_systems_side_by_side_get_the_same_bytes_whatever_their_scope() -> None:
    given = limits(gpu_memory="4GiB", together=True)
    plans = [given.budget(preset(scope=scope), OLMOE, SIZE)[1] for scope in ("layer", "global")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "larger", [{"lanes": 2}, {"rows": 256}, {"context": 400}, {"gpu": True}], ids=lambda larger: next(iter(larger))
)
def test_the_workspace_grows_with_all_that_it_is_for(larger: dict[str, Any]) -> None:
    size = {"lanes": 1, "rows": 128, "context": 192, "gpu": False}
    assert memory.workspace_bytes(OLMOE, **{**size, **larger}) > memory.workspace_bytes(OLMOE, **size)


@pytest.mark.parametrize(
    ("model_type", "lanes", "fields"),
    [
        ("deepseek_v2", 1, {}),
        ("qwen3_moe", 2, {"heads": 16, "projection_elements": 0}),
        ("gpt_oss", 2, {"heads": 16}),
    ],
)
@pytest.mark.parametrize("part", ["prompt", "step"])
def test_what_torch_takes_in_a_long_context_is_within_the_workspace(
    part: str, model_type: str, lanes: int, fields: dict[str, int]
) -> None:
    """Lanes are padded, which makes a mask."""
    spec, context = tiny.SPECS[model_type].model_copy(update=fields), 400
    model = load_spec(spec, model_type=model_type, with_experts=True).model
    ids, mask = torch.zeros(lanes, context, dtype=torch.int64), torch.ones(lanes, context, dtype=torch.int64)
    mask[1:, : context // 2] = 0
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        with record_function("step"):
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows, kept = (lanes, 0) if part == "step" else (lanes * (context - 1), lanes * context * spec.kv_bytes_per_token)
    bound = memory.workspace_bytes(spec, lanes=lanes, rows=rows, context=context, gpu=False)
    assert 0.02 * bound < taken(seen)[part] - kept <= bound


def taken(seen: profile) -> dict[str, int]:
    """The most bytes that torch had at once beside those at the beginning of the prompt, and of the step."""
    now, began, most = 0, {"prompt": 0}, {"prompt": 0}
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "step":
            began["step"] = most["step"] = now
        elif event.name() == "[memory]":
            part, now = [*began][-1], now + event.nbytes()
            most[part] = max(most[part], now)
    return {part: most[part] - began[part] for part in most}


def test_quantised_experts_need_room_to_be_unpacked() -> None:
    kept = OLMOE.model_copy(update={"expert_bits": 8.0})
    plain, quantised = (memory.workspace_bytes(one, lanes=1, rows=8, context=8, gpu=False) for one in (OLMOE, kept))
    assert quantised - plain == 2 * OLMOE.expert_bytes


def plan_of(spec: ModelSpec, **budget: int) -> MemoryPlan:
    return MemoryPlan.of(spec, Budget(**budget), scope="layer", lanes=1, context=8)


@pytest.mark.parametrize("gpu", [True, False])
def test_what_the_host_cannot_hold_is_refused(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the host also holds what stands for one."""
    plan = plan_of(OLMOE, slots=16)
    weights = OLMOE.dense_bytes + 16 * 64 * OLMOE.expert_bytes
    needed = weights + (0 if gpu else plan.total_bytes - OLMOE.dense_bytes)
    monkeypatch.setattr(memory, "_check_gpu", lambda plan: None)
    monkeypatch.setattr("traces.memory.free_bytes", lambda: needed)
    memory.check_room(OLMOE, plan, gpu=gpu)
    monkeypatch.setattr("traces.memory.free_bytes", lambda: needed - 1)
    beside = "" if gpu else r" and 3\.2 GB of slots, KV cache and workspace"
    with pytest.raises(
        InputError, match=rf"^model must fit the host's free memory .* with 13\.8 GB of bf16 weights{beside}$"
    ):
        memory.check_room(OLMOE, plan, gpu=gpu)


def test_what_the_gpu_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(OLMOE, slots=16)
    monkeypatch.setattr("traces.memory.free_bytes", lambda: 10**12)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (plan.total_bytes, 80 * 10**9))
    memory.check_room(OLMOE, plan, gpu=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (plan.total_bytes - 1, 80 * 10**9))
    with pytest.raises(
        InputError,
        match=r"^gpu-memory \(or cache\) must fit what is free .*4\.\d\d of 80\.00 GB; another process may hold",
    ):
        memory.check_room(OLMOE, plan, gpu=True)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def full(*given: Any, **named: Any) -> None:
    raise FULL


def test_a_gpu_that_is_full_is_told_and_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine_on("cpu") as machine:
        held = machine.slots(4)
        with monkeypatch.context() as patch:
            patch.setattr("real.decode.DeviceSlots", full)
            with pytest.raises(
                InputError,
                match=r"^gpu-memory \(or cache\) must be lower: the GPU must have room for 2\.00 GiB, and another",
            ):
                decode(machine, PROMPTS, SystemSpec(), Budget(slots=5), COSTS)
        assert held.bytes == 0
        assert len(machine.slots(4)) == 4, "the machine can go on"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),  # of a context
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    ],
)
def test_a_gpu_that_is_full_outside_torchs_allocator_is_told_too(error: RuntimeError) -> None:
    with pytest.raises(InputError, match=r"the GPU must have room for more.* got out of memory") as told:
        with_error(error)
    assert told.value.__cause__ is None
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "out of range", ""])
def test_other_errors_of_a_gpu_stay_what_they_are(text: str) -> None:
    with pytest.raises(RuntimeError) as told:
        with_error(RuntimeError(text))
    assert str(told.value) == text


def with_error(error: RuntimeError) -> None:
    with memory.told_when_full():
        raise error


def test_a_gpu_without_room_for_a_context_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_context(*given: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", no_context)
    monkeypatch.setattr(torch.cuda, "Stream", no_context)
    monkeypatch.setattr(torch.cuda.Stream, "priority_range", no_context, raising=False)
    with pytest.raises(InputError, match="the GPU must have room for more, and another process may hold"):
        open_device("cuda")
    monkeypatch.setattr("traces.memory.free_bytes", lambda: 10**12)
    with pytest.raises(InputError, match="the GPU must have room for more, and another process may hold"):
        memory.check_room(OLMOE, plan_of(OLMOE, slots=16), gpu=True)


def test_what_an_earlier_model_left_is_given_back_when_a_gpu_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("real.device.give_back", lambda: order.append("given back"))
    monkeypatch.setattr("real.cuda_device.CudaDevice", lambda: order.append("opened"))
    open_device("cuda")
    open_device("cpu").close()
    assert order == ["given back", "opened"]


def test_a_run_that_meets_a_full_gpu_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine_on("cpu") as machine:
        with monkeypatch.context() as patch:
            patch.setattr(DeviceSlots, "read", full)
            with pytest.raises(InputError, match="the GPU must have room for"):
                decode(machine, PROMPTS, SystemSpec(), Budget(slots=5), COSTS)
        _, _, tokens = decode(machine, PROMPTS[:1], SystemSpec(), Budget(slots=5), COSTS, max_new_tokens=3)
        assert tokens == tiny.greedy(tiny.model(), PROMPTS[:1], 3)


def test_a_model_that_does_not_fit_leaves_nothing_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = own_model()
    real, moved = loaded.model.to, []

    def to(where: Any) -> Any:
        moved.append(str(where))
        return full() if len(moved) == 1 else real(where)

    monkeypatch.setattr(loaded.model, "to", to)
    with open_device("cpu") as device, pytest.raises(InputError, match="the GPU must have room for"):
        Machine.prepare(loaded, device)
    assert moved == ["cpu", "meta"]
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


PROGRAM = """
import resource, sys
from pathlib import Path
from real.cli_run import machine_of
from real.decode import decode
from sim.systems import Budget, SystemSpec
from tests.real.running import COSTS

def run(path):
    with machine_of(path, device="cpu") as machine:
        result, _, _ = decode(machine, [[1, 2, 3]], SystemSpec(), Budget(slots=2), COSTS, max_new_tokens=3)
        spec = machine.loaded.spec
    return result.info.peak["host_resident_bytes"], spec, (2 * spec.moe_layers + 2) * spec.expert_bytes

begin, _, _ = run(sys.argv[1])  # all libraries are there, and have what they keep
most, spec, slots = run(sys.argv[2])
weights = spec.dense_bytes + spec.moe_layers * spec.experts * spec.expert_bytes
print(weights, most - begin - slots)
"""


def checkpoint(folder: Path, **fields: int) -> str:
    """A checkpoint with random weights."""
    spec = tiny.SPECS["olmoe"].model_copy(update=fields)
    load_spec(spec, model_type="olmoe", with_experts=True).model.save_pretrained(folder)
    return str(folder)


def test_the_host_takes_the_weights_and_a_tenth_at_most(tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small")
    large = checkpoint(
        tmp_path / "large", layers=4, moe_layers=4, experts=32, hidden=256, expert_width=512, head_dim=64
    )
    root = {**os.environ, "PYTHONPATH": str(Path(moetwin.__file__).parent)}
    words = [sys.executable, "-c", PROGRAM, small, large]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=root)
    assert done.returncode == 0, done.stderr
    weights, taken = map(int, done.stdout.split())
    assert weights > 200e6
    assert 0.9 * weights < taken <= 1.1 * weights
