"""Experts in 8 and 4 bits: rounded as told, as small as told, and computed alike wherever they are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real.decode import Machine
from real.device import open_device
from real.generate import Sampler, generate, left_pad
from real.models.families import FAMILIES
from real.models.load import LoadedModel, dimensions, load, load_spec
from real.packing import QuantisedPacking, packing_of
from real.quant import GROUP, QUANTS, SCALE, quantised_spec
from real.store import DeviceSlots, HostStore
from tests.real import tiny
from tests.real.running import DEVICES, PROMPTS, assert_near, decoded, own_model
from traces.errors import InputError

EVERY = pytest.mark.parametrize("model_type", list(FAMILIES))
BOTH = pytest.mark.parametrize("quant", list(QUANTS))
BYTES = {"int8": 1536 + 24 * 2, "int4": 768 + 24 * 2}
"""An expert of 1536 weights in 24 groups, each with a scale of two bytes."""


def quantised(model_type: str, quant: str) -> LoadedModel:
    loaded = own_model(model_type)
    return replace(loaded, spec=quantised_spec(loaded.spec, quant), quant=quant)


def restored(store: HostStore, layer: int, expert: int) -> list[torch.Tensor]:
    """The tensors that a quantised expert stands for, read off its buffer by hand."""
    packing = store.packing
    assert isinstance(packing, QuantisedPacking)
    *views, scales = store.views(store.expert(layer, expert))
    tensors, used = [], 0
    for view, shape in zip(views, packing.plain.shapes.values(), strict=True):
        if len(shape) == 1:
            tensors.append(view.view(store.dtype))
            continue
        codes = view if view.shape[1] == GROUP else torch.cat([view & 15, view >> 4], dim=1)
        codes = codes.view(torch.int8).float() if view.shape[1] == GROUP else codes.float() - 8
        own = scales.view(SCALE)[used : used + len(view)].float()
        tensors.append((codes * own[:, None]).view(shape))
        used += len(view)
    return tensors


def test_whole_numbers_within_the_codes_are_kept() -> None:
    for quant, most in ((QUANTS["int8"], 127), (QUANTS["int4"], 7)):
        group = torch.arange(GROUP).remainder(2 * most + 1)[None].float() - most
        group[0, 5] = most
        scales = quant.scales(group)
        assert scales.tolist() == [1.0]
        assert torch.equal(quant.weights(quant.codes(group, scales), scales, torch.float32), group)


def test_codes_by_hand() -> None:
    group = torch.zeros(1, GROUP)
    group[0, 0], group[0, 1], group[0, 32], group[0, 33] = -7, 3.4, 2, -0.6
    nibbles = QUANTS["int4"].codes(group, QUANTS["int4"].scales(group))
    assert nibbles.shape == (1, 32)
    assert nibbles[0, :3].tolist() == [1 + 16 * 10, 11 + 16 * 7, 8 + 16 * 8]
    group[0, 0] = -127
    whole = QUANTS["int8"].codes(group, QUANTS["int8"].scales(group))
    assert whole.view(torch.int8)[0, [0, 1, 2, 32, 33]].tolist() == [-127, 3, 0, 2, -1]


@BOTH
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2 * GROUP, max_size=2 * GROUP),
    exponent=st.integers(-12, 3),
)
def test_a_weight_is_off_by_less_than_a_step(quant: str, values: list[float], exponent: int) -> None:
    how, groups = QUANTS[quant], torch.tensor(values).view(2, GROUP) * 2.0**exponent
    scales = how.scales(groups)
    back = how.weights(how.codes(groups, scales), scales, torch.float32)
    steps = groups.abs().amax(1, keepdim=True) / how.most
    assert ((back - groups).abs() <= 0.76 * steps + 1e-37).all()  # half, and what rounding the scale costs the largest
    assert torch.equal(back[groups == 0], groups[groups == 0])


@EVERY
@BOTH
def test_a_quantised_expert_is_near_the_expert(model_type: str, quant: str) -> None:
    plain, store = tiny.model(model_type), HostStore(quantised(model_type, quant))
    form = plain.family.form(plain.config)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    wanted = form.run(plain.family.experts_tensors(plain.layers[1].experts, 6), hidden)
    got = store.form.run(store.views(store.expert(1, 6)), hidden)
    assert got.dtype == wanted.dtype
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < {"int8": 0.02, "int4": 0.3}[quant]
    assert torch.equal(got, form.run(tuple(restored(store, 1, 6)), hidden))


@BOTH
def test_store_and_slots_are_as_small_as_the_dimensions_say(quant: str) -> None:
    store = HostStore(quantised("olmoe", quant))
    assert store.spec.expert_bytes == BYTES[quant]
    assert store.bytes == 2 * 8 * BYTES[quant]
    assert DeviceSlots(store, 3, torch.device("cpu")).bytes == 3 * BYTES[quant]


@BOTH
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_biases_are_kept_as_they_are(quant: str, dtype: str) -> None:
    loaded = load_spec(tiny.SPECS["gpt_oss"], model_type="gpt_oss", dtype=dtype, with_experts=True, quant=quant)
    biases = [
        tensor.clone() for tensor in loaded.family.experts_tensors(loaded.layers[0].experts, 1) if tensor.ndim == 1
    ]
    assert biases
    store = HostStore(loaded)
    assert store.form.elements == store.spec.expert_bytes
    found = restored(store, 0, 1)[-len(biases) :]
    assert all(torch.equal(one, other) for one, other in zip(found, biases, strict=True))
    hidden = torch.ones(1, 32, dtype=store.dtype)
    assert store.form.run(store.views(store.expert(0, 1)), hidden).dtype == store.dtype


@cache
def all_resident(model_type: str, quant: str) -> tuple[list[list[int]], list[torch.Tensor]]:
    """What a model without offloading gives whose experts are the ones that the quantised ones stand for."""
    store, plain = HostStore(quantised(model_type, quant)), own_model(model_type)
    for layer in plain.layers:
        for expert in range(plain.spec.experts):
            tensors = plain.family.experts_tensors(layer.experts, expert)
            for into, tensor in zip(tensors, restored(store, layer.index, expert), strict=True):
                into.copy_(tensor)
    made = generate(plain.model, *left_pad(PROMPTS), max_new_tokens=4, sampler=Sampler(), keep_logits=True)
    return made.tokens, made.logits


@EVERY
@BOTH
@pytest.mark.parametrize("device", DEVICES)
def test_decoding_is_that_of_all_experts_resident(model_type: str, quant: str, device: str) -> None:
    tokens, logits = all_resident(model_type, quant)
    with open_device(device) as opened:
        machine = Machine.prepare(quantised(model_type, quant), opened)
        few = decoded(machine, PROMPTS, 4, 2)
        every = decoded(machine, PROMPTS, 4, 8)
        on_cpu = decoded(machine, PROMPTS, 4, 2, place="cpu-on-miss")
    for run in (few, every, on_cpu):
        assert run.tokens == tokens
        assert_near([step.cpu() for step in run.logits], logits)
    assert set(few.operations.query("op == 'copy'")["bytes"]) == {machine.store.spec.expert_bytes}
    if device == "cpu":
        assert all(torch.equal(one, other) for one, other in zip(few.logits, every.logits, strict=True))


@BOTH
def test_random_quantised_experts_are_seeded_finite_and_differ(quant: str) -> None:
    store, again = (HostStore(load_spec(tiny.SPECS["gpt_oss"], dtype="bf16", quant=quant), seed=1) for _ in range(2))
    experts = [restored(store, layer, expert) for layer in range(2) for expert in range(8)]
    for number, tensors in enumerate(experts):
        assert all(float(tensor.abs().max()) <= 0.024 for tensor in tensors)
        assert float(tensors[0].abs().max()) > 0.01
        assert not any(torch.equal(tensors[0], other[0]) for other in experts[:number])
    assert torch.equal(store.expert(1, 3), again.expert(1, 3))


@BOTH
def test_a_checkpoint_is_quantised_while_it_is_read(quant: str, tmp_path: Path) -> None:
    tiny.model("mixtral").model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), quant=quant)
    assert loaded.spec == dimensions(str(tmp_path), quant=quant)
    assert loaded.spec.expert_bytes == BYTES[quant]
    store, wanted = HostStore(loaded), HostStore(quantised("mixtral", quant))
    assert torch.equal(store.expert(1, 7), wanted.expert(1, 7))


def test_a_model_without_quant_is_packed_as_it_is() -> None:
    loaded = own_model()
    form = loaded.family.form(loaded.config)
    packing = packing_of(form, torch.bfloat16, None)
    assert packing.dtype == torch.bfloat16
    assert packing.form is form


def test_what_cannot_be_quantised_is_told() -> None:
    with pytest.raises(InputError, match=r"quant must be a known name, got 'int5' \(did you mean int8 or int4\?\)"):
        dimensions("olmoe-1b-7b", random_weights=True, quant="int5")
    odd = tiny.SPECS["olmoe"].model_copy(update={"expert_width": 10})
    with pytest.raises(InputError, match=r"matrices of a multiple of 128 weights, got 320 in tiny-olmoe"):
        load_spec(odd, quant="int8")
