"""Expert weights on the host and in slots: packed without loss, held once, and never mistaken for another's."""

from __future__ import annotations

import pytest
import torch

from real.decode import Machine
from real.device import open_device
from real.models.families import FAMILIES
from real.models.load import load_spec
from real.store import ABSENT, DeviceSlots, HostStore, SlotError
from tests.real import tiny
from tests.real.running import DEVICES, own_model


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_experts_are_packed_without_loss(model_type: str) -> None:
    loaded, plain = own_model(model_type), tiny.model(model_type)
    store = HostStore(loaded)
    for layer in plain.layers:
        for expert in range(plain.spec.experts):
            gate_up, down = plain.family.experts_tensors(layer.experts, expert)
            packed_gate_up, packed_down = store.views(store.expert(layer.index, expert))
            assert torch.equal(packed_gate_up, gate_up)
            assert torch.equal(packed_down, down)


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_nothing_is_held_twice(model_type: str) -> None:
    loaded = own_model(model_type)
    whole = sum(parameter.numel() for parameter in loaded.model.parameters())
    store = HostStore(loaded)
    left = sum(parameter.numel() for parameter in loaded.model.parameters())
    spec = loaded.spec
    assert whole - left == spec.moe_layers * spec.experts * spec.expert_elements
    assert store.bytes == spec.moe_layers * spec.experts * spec.expert_bytes
    assert not any(list(layer.experts.parameters()) for layer in loaded.layers)


def test_experts_can_be_taken_out_only_once() -> None:
    loaded = own_model()
    HostStore(loaded)
    with pytest.raises(ValueError, match="model must still hold its experts to be packed, got tiny-qwen3_moe"):
        HostStore(loaded)


def random_store(seed: int) -> HostStore:
    return HostStore(load_spec(tiny.SPECS["olmoe"], dtype="bf16"), seed=seed)


def test_random_experts_are_seeded_and_differ() -> None:
    first, again, other = random_store(1), random_store(1), random_store(2)
    assert torch.equal(first.expert(1, 3), again.expert(1, 3))
    assert not torch.equal(first.expert(1, 3), other.expert(1, 3))
    assert not torch.equal(first.expert(1, 3), first.expert(1, 4))
    assert not torch.equal(first.expert(0, 3), first.expert(1, 3))
    assert first.dtype == torch.bfloat16
    assert 0 < float(first.expert(0, 0).abs().max()) <= 0.0201


def test_progress_is_told_of_every_layer() -> None:
    calls: list[int] = []
    HostStore(own_model(), progress=lambda: calls.append(1))
    assert len(calls) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_gives_only_the_expert_that_it_holds(device: str) -> None:
    with open_device(device) as opened, torch.inference_mode():
        store = HostStore(own_model(), pin=device == "cuda")
        slots = DeviceSlots(store, 2, opened.torch_device)
        slots.load(1, 0, 5)
        gate_up, down = slots.read(1, 0, 5)
        wanted_gate_up, wanted_down = store.views(store.expert(0, 5))
        assert torch.equal(gate_up.cpu(), wanted_gate_up)
        assert torch.equal(down.cpu(), wanted_down)
        for slot, layer, expert in ((0, 0, 5), (1, 1, 5), (1, 0, 4)):
            with pytest.raises(SlotError, match=f"slot {slot} must hold expert {expert} of layer {layer}"):
                slots.read(slot, layer, expert)
        slots.load(1, 1, 2)
        with pytest.raises(SlotError, match=r"it holds \(1, 2\)"):
            slots.read(1, 0, 5)
    assert slots.bytes == 2 * store.spec.expert_bytes


def test_a_copy_that_fails_leaves_no_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore(own_model())
    slots = DeviceSlots(store, 1, torch.device("cpu"))
    with torch.inference_mode():
        slots.load(0, 0, 1)
        with pytest.raises(IndexError):
            slots.load(0, 0, 99)
    with pytest.raises(SlotError, match=f"it holds \\({ABSENT}, {ABSENT}\\)"):
        slots.read(0, 0, 1)


def test_the_dense_part_goes_to_the_device() -> None:
    with open_device("cpu") as device:
        machine = Machine.prepare(own_model(), device)
        assert {parameter.device.type for parameter in machine.loaded.model.parameters()} == {"cpu"}
        assert machine.hardware == "cpu device"
