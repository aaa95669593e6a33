"""Checkpoints: every layout that transformers writes comes into the host store, and what is wrong with one is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from real.models.families import FAMILIES
from real.models.load import LoadedModel, load, load_spec
from real.store import HostStore
from tests.real import tiny
from tests.real.running import own_model
from traces.errors import InputError

EVERY = pytest.mark.parametrize("model_type", list(FAMILIES))
DECODERS = pytest.mark.parametrize("model_type", tiny.DECODERS)
LAYOUTS: dict[str, dict[str, Any]] = {
    "the hub's names": {},
    "fused": {"save_original_format": False},
    "shards": {"max_shard_size": "30KB"},
    "fused shards": {"save_original_format": False, "max_shard_size": "30KB"},
}
Weights = dict[str, torch.Tensor]


def saved(loaded: LoadedModel, folder: Path, **layout: Any) -> Path:
    loaded.model.save_pretrained(folder, **layout)
    return folder


def same_experts(store: HostStore, other: HostStore) -> bool:
    spec = store.spec
    pairs = [
        (store.expert(layer, expert), other.expert(layer, expert))
        for layer in range(spec.moe_layers)
        for expert in range(spec.experts)
    ]
    return all(torch.equal(one, two) for one, two in pairs)


@EVERY
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_experts_are_read_into_the_store_from_every_layout(model_type: str, layout: str, tmp_path: Path) -> None:
    saved(tiny.model(model_type), tmp_path, **LAYOUTS[layout])
    loaded = load(str(tmp_path))
    assert all(weight.is_meta for layer in loaded.layers for weight in layer.experts.parameters())
    assert same_experts(HostStore(loaded), HostStore(own_model(model_type)))
    assert not any(list(layer.experts.parameters()) for layer in loaded.layers)
    dense = dict(loaded.model.named_parameters())
    theirs = dict(tiny.model(model_type).model.named_parameters())
    assert dense
    assert all(torch.equal(weight, theirs[name]) for name, weight in dense.items())


@DECODERS
def test_a_whole_model_computes_what_was_saved(model_type: str, tmp_path: Path) -> None:
    original = tiny.model(model_type)
    loaded = load(str(saved(original, tmp_path)), with_experts=True)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_the_files_are_both_original_and_fused(tmp_path: Path) -> None:
    original = load_file(saved(tiny.model("mixtral"), tmp_path / "a") / "model.safetensors")
    fused = load_file(saved(tiny.model("mixtral"), tmp_path / "b", save_original_format=False) / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.7.w3.weight" in original
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    assert len(list(saved(tiny.model("mixtral"), tmp_path / "c", max_shard_size="30KB").glob("*.safetensors"))) > 2


def test_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    saved(tiny.model("olmoe"), tmp_path)
    half, whole = load(str(tmp_path), dtype="bf16"), load(str(tmp_path))
    head = half.model.get_output_embeddings().weight
    assert torch.equal(head, whole.model.get_output_embeddings().weight.to(torch.bfloat16))
    rounded, exact = HostStore(half), HostStore(whole)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.expert(1, 2), exact.expert(1, 2).to(torch.bfloat16))


def test_a_bf16_file_is_widened(tmp_path: Path) -> None:
    loaded = load_spec(tiny.SPECS["mixtral"], dtype="bf16", with_experts=True)
    saved(loaded, tmp_path)
    wide = HostStore(load(str(tmp_path), dtype="fp32"))
    assert wide.dtype == torch.float32
    assert torch.equal(wide.expert(0, 3).to(torch.bfloat16), HostStore(loaded).expert(0, 3))


def test_the_balancing_bias_stays_in_fp32(tmp_path: Path) -> None:
    saved(tiny.model("deepseek_v3"), tmp_path)
    loaded = load(str(tmp_path), dtype="bf16")
    bias, original = (
        one.layers[0].router.get_buffer("e_score_correction_bias") for one in (loaded, tiny.model("deepseek_v3"))
    )
    assert bias.dtype == torch.float32
    assert torch.equal(bias, original)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    saved(tiny.model("qwen3_moe"), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(str(tmp_path)).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_generation_config_is_that_of_the_folder(tmp_path: Path) -> None:
    saved(tiny.model(), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load(str(tmp_path)).eos_ids == {5, 6}


def edited(folder: Path, change: Callable[[Weights], object], model_type: str = "mixtral", **layout: Any) -> Path:
    """A folder whose one file has been changed; returns the file."""
    path = saved(tiny.model(model_type), folder, **layout) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return path


EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"
MISSING: dict[str, tuple[dict[str, Any], str, str]] = {
    "an expert's matrix": ({}, EXPERT, EXPERT),
    "all experts of a layer": ({"save_original_format": False}, FUSED, FUSED),
    "a router": ({}, "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    "the head": ({}, "lm_head.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("what", list(MISSING))
def test_a_missing_tensor_is_named(what: str, tmp_path: Path) -> None:
    layout, key, told = MISSING[what]
    edited(tmp_path, lambda weights: weights.pop(key), **layout)
    with pytest.raises(InputError) as raised:
        load(str(tmp_path))
    assert str(raised.value) == f"{tmp_path} must hold every weight of the model, got none for {told}"


def test_a_matrix_that_no_expert_has_is_named(tmp_path: Path) -> None:
    def drop(weights: Weights) -> None:
        for key in [key for key in weights if ".0." in key and key.endswith("w3.weight")]:
            del weights[key]

    edited(tmp_path, drop)
    with pytest.raises(InputError, match=r"got none for .*w3\.weight of model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        load(str(tmp_path))


@pytest.mark.parametrize("key", ["model.layers.0.extra.weight", "model.layers.7.input_layernorm.weight"])
def test_a_tensor_that_the_model_has_not_is_named(key: str, tmp_path: Path) -> None:
    path = edited(tmp_path, lambda weights: weights.update({key: torch.zeros(32)}))
    with pytest.raises(InputError) as raised:
        load(str(tmp_path))
    assert str(raised.value) == f"{path} must hold tensors of the model alone, got {key}, which it has not"


def test_one_expert_too_many_is_named(tmp_path: Path) -> None:
    key = EXPERT.replace(".5.", ".8.")
    path = edited(tmp_path, lambda weights: weights.update({key: weights[EXPERT].clone()}))
    with pytest.raises(InputError) as raised:
        load(str(tmp_path))
    assert str(raised.value) == f"{path} must hold 8 experts a layer, got {key}"


def test_buffers_of_old_files_are_left_out(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(tmp_path, lambda weights: weights.update({key: torch.zeros(4)}))
    load(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "shape", "layout"),
    [
        (EXPERT, (15, 32), {}),
        (EXPERT, (16, 31), {}),
        (EXPERT, (16 * 32,), {}),
        (FUSED, (8, 31, 32), {"save_original_format": False}),
        ("model.norm.weight", (33,), {}),
    ],
)
def test_a_wrong_shape_is_named(key: str, shape: tuple[int, ...], layout: dict[str, Any], tmp_path: Path) -> None:
    path = edited(tmp_path, lambda weights: weights.update({key: torch.zeros(shape)}), **layout)
    with pytest.raises(InputError) as raised:
        load(str(tmp_path))
    assert str(raised.value).startswith(f"{path} must hold model.")
    assert f"{key} {list(shape)}" in str(raised.value)


def shards(folder: Path) -> list[Path]:
    return sorted(saved(tiny.model("olmoe"), folder, max_shard_size="30KB").glob("*.safetensors"))


def test_a_torn_shard_is_named(tmp_path: Path) -> None:
    second = shards(tmp_path)[1]
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"{second.name} must be a whole safetensors file, got: .*incomplete"):
        load(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    second = shards(tmp_path)[1]
    second.unlink()
    with pytest.raises(InputError) as raised:
        load(str(tmp_path))
    told = "must exist, as model.safetensors.index.json beside it names it, got no such file"
    assert str(raised.value) == f"{second} {told}"


def test_a_shard_without_what_the_index_says_is_named(tmp_path: Path) -> None:
    second = shards(tmp_path)[1]
    weights = load_file(second)
    key = sorted(weights)[0]
    save_file({name: weights[name] for name in weights if name != key}, second)
    with pytest.raises(InputError, match=rf"{second.name} must hold {key}, as model\.safetensors\.index\.json says"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", ["{]", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json must be JSON with a weight_map, got: "):
        load(str(tmp_path))


def test_a_dtype_that_no_weight_has_is_named(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda weights: weights.update({EXPERT: weights[EXPERT].to(torch.int16)}))
    with pytest.raises(InputError, match=rf"{path}: {EXPERT} must be of a dtype among F32, .*, got I16"):
        load(str(tmp_path))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    saved(tiny.model("olmoe"), tmp_path)
    loaded = load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors must not change while it is read, got an end within "):
        HostStore(loaded)


def with_quantization(folder: Path, method: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))


def test_other_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    saved(tiny.model("deepseek_v3"), tmp_path)
    with_quantization(tmp_path, "fp8")
    with pytest.raises(InputError, match=rf"{tmp_path}: quantization_config must be that of MXFP4 .*, got .*fp8"):
        load(str(tmp_path))


MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""What the codes of FP4 (e2m1) stand for; the fourth bit is the sign."""


def mxfp4_by_hand(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows of 32 weights a block: the low half of a byte first; OCP Microscaling Formats (MX) 1.0, section 5."""
    table = torch.tensor([*MAGNITUDES, *(-one for one in MAGNITUDES)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    return (table[codes] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)


def test_mxfp4_experts_are_unpacked_one_by_one(tmp_path: Path) -> None:
    spec = tiny.SPECS["gpt_oss"].model_copy(update={"expert_width": 32, "expert_biases": 96})
    saved(load_spec(spec, model_type="gpt_oss", with_experts=True), tmp_path)
    path, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    weights = load_file(path)
    for key in [key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = weights.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        weights[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[f"{key}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    with_quantization(tmp_path, "mxfp4")
    store = HostStore(load(str(tmp_path)))
    place = "model.layers.1.mlp.experts"
    for expert in (0, 7):
        gate_up, down, gate_up_bias, _ = store.views(store.expert(1, expert))
        for name, found in (("gate_up_proj", gate_up), ("down_proj", down)):
            blocks, scales = (weights[f"{place}.{name}_{part}"][expert] for part in ("blocks", "scales"))
            assert torch.equal(found, mxfp4_by_hand(blocks, scales).T)
        assert torch.equal(gate_up_bias, weights[f"{place}.gate_up_proj_bias"][expert])


MEASURE = """
import sys
from pathlib import Path
from real.models.load import load
from real.store import HostStore
folder, small = sys.argv[1:]
HostStore(load(small, dtype="bf16"))  # whatever is taken once, by whatever model
def taken(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
before = taken("VmRSS")
loaded = load(folder, dtype="bf16")
store = HostStore(loaded)
print(store.bytes, taken("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory in use is read from /proc")
def test_host_memory_stays_within_a_tenth_of_the_weights(tmp_path: Path) -> None:
    spec = tiny.SPECS["olmoe"].model_copy(
        update={"layers": 8, "moe_layers": 8, "experts": 16, "hidden": 512, "expert_width": 256, "heads": 64}
    )
    small = saved(tiny.model("olmoe"), tmp_path / "small")
    big = load_spec(spec, dtype="bf16", with_experts=True)
    weights = sum(weight.nbytes for weight in big.model.parameters())
    saved(big, tmp_path / "big", max_shard_size="30MB")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stored, taken = map(int, done.stdout.split())
    assert stored == 8 * 16 * 3 * 512 * 256 * 2
    assert stored < weights
    assert 0.9 * weights < taken < 1.1 * weights
