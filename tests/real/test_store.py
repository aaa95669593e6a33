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
            tensors = plain.family.experts_tensors(layer.experts, expert)
            packed = store.views(store.expert(layer.index, expert))
            assert all(torch.equal(one, other) for one, other in zip(packed, tensors, strict=True))


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


def test_every_random_expert_differs_where_they_are_windows_of_one_small_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real.packing._BLOCK_BYTES", 2 * 1000)
    store = random_store(1)
    spec = store.spec
    assert spec.expert_elements > 1000
    experts = {
        tuple(store.expert(layer, expert).tolist())
        for layer in range(spec.moe_layers)
        for expert in range(spec.experts)
    }
    assert len(experts) == spec.moe_layers * spec.experts
    assert all(min(numbers[:1000]) < -0.01 < 0.01 < max(numbers[-536:]) for numbers in experts)


def test_large_random_matrices_outside_the_experts_have_the_spread_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = load_spec(tiny.SPECS["olmoe"], seed=5).model
    monkeypatch.setattr("real.models.load._LARGE", 1000)
    model, again, other = (load_spec(tiny.SPECS["olmoe"], seed=seed).model for seed in (5, 5, 6))
    heads = [one.get_output_embeddings().weight for one in (model, again, other, wanted)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], model.get_input_embeddings().weight)
    assert float(heads[0].std()) == pytest.approx(float(heads[3].std()), rel=0.1)
    assert torch.equal(model.model.norm.weight, wanted.model.norm.weight)


class Cudart:
    """What pins memory, in the place of CUDA: it takes ``most`` buffers, and refuses the others."""

    def __init__(self, most: int) -> None:
        self.most, self.registered, self.sizes = most, set[int](), list[int]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        if len(self.registered) == self.most:
            return 2
        self.registered.add(pointer)
        self.sizes.append(size)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        self.registered.remove(pointer)
        return 0


@pytest.mark.parametrize("most", [0, 1, 2])
def test_what_cannot_be_pinned_stays_pageable(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(most)
    monkeypatch.setattr("torch.cuda.cudart", lambda: cudart)
    monkeypatch.setattr("real.store._clear_error", lambda: False)
    store = HostStore(own_model(), pin=True)
    layer_bytes = store.spec.experts * store.spec.expert_bytes
    assert cudart.sizes == [layer_bytes] * most
    assert store.pinned_bytes == most * layer_bytes
    assert store.bytes == 2 * layer_bytes
    sizes = f"{(2 - most) * layer_bytes / 1e9:.1f} of {2 * layer_bytes / 1e9:.1f} GB of experts are in pageable memory"
    assert [note.partition(",")[0] for note in store.notes] == ([sizes] if most < 2 else [])
    assert cudart.registered == {store.expert(layer, 0).data_ptr() for layer in range(most)}
    plain = HostStore(own_model())
    assert plain.pinned_bytes == 0
    assert not plain.notes, "nobody asked for pinned memory"
    assert all(torch.equal(store.expert(layer, 3), plain.expert(layer, 3)) for layer in range(2))
    store.close()
    assert not cudart.registered
    assert store.pinned_bytes == 0


def test_memory_is_unpinned_when_the_store_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(2)
    monkeypatch.setattr("torch.cuda.cudart", lambda: cudart)
    store = HostStore(own_model(), pin=True)
    assert len(cudart.registered) == 2
    del store
    assert not cudart.registered


def test_cuda_that_cannot_pin_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr("torch.cuda.cudart", absent)
    assert HostStore(own_model(), pin=True).pinned_bytes == 0


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
