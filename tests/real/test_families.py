"""Every family: dimensions, modules, experts and the router's rule; and loading by name, path and spec."""

from __future__ import annotations

import json
import logging

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from real.models import families
from real.models.expert import clamped_form
from real.models.families import FAMILIES, family_for
from real.models.load import SMALL_FOLDER, SMALL_NAME, _as_input_error, dimensions, load, load_spec, random_spec
from sim.spec import catalogue
from tests.real import tiny
from traces.errors import InputError

BUILT_AS = {
    "olmoe-1b-7b": "olmoe",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "qwen2-57b-a14b": "qwen2_moe",
    "qwen3-30b-a3b": "qwen3_moe",
    "mixtral-8x7b": "mixtral",
    "mixtral-8x22b": "mixtral",
    "phi-3.5-moe": "qwen3_moe",
    "deepseek-v2-lite": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "gpt-oss-20b": "gpt_oss",
    "gpt-oss-120b": "gpt_oss",
    "moetwin-small": "qwen3_moe",
    **{f"switch-base-{experts}": "switch_transformers" for experts in (8, 16, 32, 64, 128, 256)},
}
EVERY = pytest.mark.parametrize("model_type", list(FAMILIES))
DECODERS = pytest.mark.parametrize("model_type", tiny.DECODERS)


def router_input(rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


@EVERY
def test_config_and_spec_are_inverse(model_type: str) -> None:
    spec = tiny.SPECS[model_type]
    family = FAMILIES[model_type]
    back = family.spec(family.config(spec), spec.name).in_dtype("fp32")
    assert back == spec.model_copy(update={"source": back.source})


@DECODERS
def test_every_moe_layer_is_found_in_order(model_type: str) -> None:
    loaded = tiny.model(model_type)
    decoder = loaded.model.get_decoder().layers
    dense = len(decoder) - loaded.spec.moe_layers
    assert [layer.index for layer in loaded.layers] == [0, 1]
    assert [layer.block for layer in loaded.layers] == [one.mlp for one in decoder[dense:]]


@EVERY
def test_spec_counts_the_weights_that_the_model_has(model_type: str) -> None:
    loaded = tiny.model(model_type)
    experts = sum(weight.numel() for layer in loaded.layers for weight in layer.experts.parameters())
    assert experts == 2 * 8 * loaded.spec.expert_elements
    weights = sum(weight.numel() for weight in loaded.model.parameters() if weight.ndim > 1) - experts
    norms = loaded.spec.hidden * (2 * loaded.spec.layers + 1)
    # the gates of shared experts, and biases by position
    uncounted = {"qwen2_moe": 2 * loaded.spec.hidden, "switch_transformers": 2 * 32 * 4}
    assert weights == loaded.spec.dense_elements - norms + uncounted.get(model_type, 0)


@EVERY
def test_gates_are_the_routers_own_weights(model_type: str) -> None:
    loaded = tiny.model(model_type)
    logits, weights, ids = loaded.layers[0].router(router_input())
    gates = loaded.family.gates(loaded.config, logits, ids)
    assert gates.dtype == weights.dtype
    torch.testing.assert_close(gates, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_gates_follow_the_configuration(norm: bool) -> None:
    loaded = load_spec(tiny.SPECS["qwen2_moe"], with_experts=True)
    loaded.config.norm_topk_prob = loaded.layers[0].router.norm_topk_prob = norm
    logits, weights, ids = loaded.layers[0].router(router_input())
    torch.testing.assert_close(loaded.family.gates(loaded.config, logits, ids), weights, rtol=1e-6, atol=0)
    assert bool((weights.sum(-1) > 0.999).all()) == norm


def test_deepseek_gates_are_scaled() -> None:
    family = FAMILIES["deepseek_v2"]
    config = family.config(tiny.SPECS["deepseek_v2"])
    config.routed_scaling_factor = 16.0
    gates = family.gates(config, torch.zeros(1, 8), torch.tensor([[1, 5]]))
    assert gates.tolist() == [[2.0, 2.0]]


@EVERY
def test_experts_tensors_compute_what_the_experts_compute(model_type: str) -> None:
    loaded = tiny.model(model_type)
    hidden, experts, form = router_input(4), loaded.layers[1].experts, loaded.family.form(loaded.config)
    tensors = loaded.family.experts_tensors(experts, 5)
    assert {name: tuple(one.shape) for name, one in zip(form.shapes, tensors, strict=True)} == form.shapes
    assert all(tensor.is_contiguous() for tensor in tensors)
    theirs = experts(hidden, torch.full((4, 1), 5), torch.ones(4, 1))
    torch.testing.assert_close(form.run(tensors, hidden), theirs)
    torch.testing.assert_close(
        form.run(tensors, 50 * hidden), experts(50 * hidden, torch.full((4, 1), 5), torch.ones(4, 1))
    )
    assert form.elements == loaded.spec.expert_elements


@EVERY
def test_a_flat_expert_is_seen_as_its_tensors(model_type: str) -> None:
    loaded = tiny.model(model_type)
    form, tensors = loaded.family.form(loaded.config), loaded.family.experts_tensors(loaded.layers[0].experts, 3)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    views = form.views(flat)
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))
    assert all(view.untyped_storage().data_ptr() == flat.data_ptr() for view in views)


def test_an_expert_of_gpt_oss_clamps_both_halves_and_shifts_up_by_one() -> None:
    form = clamped_form(hidden=1, width=2, alpha=1.0, limit=2.0)
    gate_up, down = torch.tensor([[3.0, -9.0, -5.0, 0.5]]), torch.tensor([[2.0], [10.0]])
    biases = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([0.25])
    # gates 4 and -4, of which one is cut to 2; ups -9 and 1, of which one is cut to -2
    sigmoid = [0.8807970779778823, 0.01798620996209156]
    wanted = 2 * (-2 + 1) * 2 * sigmoid[0] + 10 * (1 + 1) * -4 * sigmoid[1] + 0.25
    assert form.run((gate_up, down, *biases), torch.ones(1, 1)).item() == pytest.approx(wanted)
    assert form.elements == 4 + 2 + 4 + 1


@pytest.mark.parametrize(("norm", "wanted"), [(True, [1.2, 0.8]), (False, [1.5, 1.0])])
def test_gates_of_deepseek_v3_are_scaled_sigmoids(norm: bool, wanted: list[float]) -> None:
    family = FAMILIES["deepseek_v3"]
    config = family.config(tiny.SPECS["deepseek_v3"])
    config.norm_topk_prob, config.routed_scaling_factor = norm, 2.0
    logits = torch.tensor([[0.75, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]]).logit()
    assert family.gates(config, logits, torch.tensor([[0, 1]])).tolist() == [pytest.approx(wanted)]


def test_gates_of_gpt_oss_share_one_among_the_chosen() -> None:
    family = FAMILIES["gpt_oss"]
    logits = torch.tensor([[0.0, 9.0, 1.0986123]])
    gates = family.gates(family.config(tiny.SPECS["gpt_oss"]), logits, torch.tensor([[2, 0]]))
    assert gates.tolist() == [pytest.approx([0.75, 0.25])]


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(256, 8, (8, 4)), (16, 4, (8, 4)), (8, 6, (4, 4)), (6, 2, (2, 1)), (7, 2, (1, 1))]
)
def test_groups_of_deepseek_v3_have_two_experts_and_open_enough(
    experts: int, top_k: int, groups: tuple[int, int]
) -> None:
    spec = tiny.SPECS["deepseek_v3"].model_copy(update={"experts": experts, "top_k": top_k})
    config = FAMILIES["deepseek_v3"].config(spec)
    assert (config.n_group, config.topk_group) == groups


def test_unknown_family_names_itself_and_the_supported() -> None:
    with pytest.raises(InputError, match=r"model_type must be one of qwen3_moe, olmoe, .*, got 'llama'"):
        families.family("llama")


@pytest.mark.parametrize(
    ("model_type", "change", "rule"),
    [
        ("mixtral", {"moe_layers": 1}, "an MoE block in every layer"),
        ("mixtral", {"shared_width": 8}, "no shared experts"),
        ("olmoe", {"head_dim": 16}, "heads \\* head_dim equal to hidden"),
        ("qwen3_moe", {"expert_matrices": 2}, "gated experts without biases"),
        ("qwen3_moe", {"kv_elements": 8}, "grouped-query attention"),
        ("qwen2_moe", {"shared_width": 0}, "a shared expert"),
        ("deepseek_v2", {"kv_elements": 0}, "a latent KV cache"),
        ("deepseek_v3", {"experts": 1, "top_k": 1}, "at least two experts"),
        ("gpt_oss", {"expert_biases": 0}, "a bias for gate, up and down in every expert"),
        ("deepseek_v2", {"shared_width": 24}, "shared experts of the routed experts' width"),
        ("switch_transformers", {"expert_matrices": 3}, "experts of two matrices"),
        ("switch_transformers", {"top_k": 2}, "one expert a token"),
        ("switch_transformers", {"layers": 5}, "an encoder and a decoder alike"),
        ("switch_transformers", {"dense_width": 24}, "dense layers as wide as an expert"),
        ("switch_transformers", {"kv_elements": 0}, "whole heads, and cross-attention in its decoder"),
        ("switch_transformers", {"layers": 10, "moe_layers": 8}, "MoE layers at a regular distance"),
    ],
)
def test_dimensions_that_a_family_cannot_have(model_type: str, change: dict[str, int], rule: str) -> None:
    with pytest.raises(InputError, match=f"model must have {rule} to be built as {model_type}, got 'tiny-"):
        FAMILIES[model_type].config(tiny.SPECS[model_type].model_copy(update=change))


def test_every_catalogue_model_is_built_or_refused() -> None:
    assert {*BUILT_AS, "nllb-moe-54b"} == set(catalogue.model_names())


@pytest.mark.parametrize("name", list(BUILT_AS))
def test_catalogue_models_are_built_at_their_dimensions(name: str) -> None:
    spec = catalogue.model(name)
    family = family_for(spec)
    assert family.model_type == BUILT_AS[name]
    assert family.form(family.config(spec)).elements == spec.expert_elements
    wanted = spec.in_dtype("bf16").model_copy(update={"source": "the model's config"})
    assert family.spec(family.config(spec), name) == wanted


def test_random_weights_leave_the_experts_unallocated_and_change_nothing_else() -> None:
    spec = tiny.SPECS["qwen3_moe"]
    bare, full, other = load_spec(spec), load_spec(spec, with_experts=True), load_spec(spec, seed=1)
    on_meta = {name for name, weight in bare.model.named_parameters() if weight.is_meta}
    assert on_meta == {f"model.layers.{i}.mlp.experts.{name}" for i in (1, 2) for name in ("gate_up_proj", "down_proj")}
    assert not any(buffer.is_meta for buffer in bare.model.buffers())
    weights = dict(full.model.named_parameters())
    assert all(torch.equal(weights[name], w) for name, w in bare.model.named_parameters() if not w.is_meta)
    assert not torch.equal(full.model.lm_head.weight, other.model.lm_head.weight)
    assert bare.model.lm_head.weight is bare.model.get_input_embeddings().weight
    assert float(full.layers[1].experts.down_proj.std()) == pytest.approx(0.02, rel=0.1)


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    load_spec(tiny.SPECS["olmoe"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_dtype_is_that_asked_for() -> None:
    loaded = load_spec(tiny.SPECS["mixtral"], dtype="bf16")
    assert loaded.model.lm_head.weight.dtype == torch.bfloat16
    assert loaded.spec.expert_bytes == 3 * 32 * 16 * 2
    with pytest.raises(InputError, match=r"dtype must be a known name, got 'fp61' \(did you mean fp16"):
        load_spec(tiny.SPECS["mixtral"], dtype="fp61")


@EVERY
def test_checkpoint_comes_back_as_it_was_saved(model_type: str, tmp_path, capfd) -> None:
    original = tiny.model(model_type)
    original.model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load(str(tmp_path), with_experts=True)
    assert capfd.readouterr() == ("", "")
    weights = dict(original.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.model.named_parameters())
    assert loaded.spec == original.spec.model_copy(update={"name": tmp_path.name, "source": loaded.spec.source})
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("ab<end>")["input_ids"][-1] == tiny.END
    assert len(loaded.revision) == 64
    assert not loaded.model.training


def test_revision_follows_the_weights(tmp_path) -> None:
    tiny.model().model.save_pretrained(tmp_path)
    before = load(str(tmp_path)).revision
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    assert load(str(tmp_path)).revision != before


def test_unknown_name_offers_the_near_ones() -> None:
    with pytest.raises(
        InputError, match=r"model must be a known name, got 'moetwin-smal' \(did you mean moetwin-small\?"
    ):
        load("moetwin-smal")
    with pytest.raises(InputError, match="did you mean mixtral-8x7b"):
        load("mixtral-8x7", random_weights=True)


def test_path_must_exist(tmp_path) -> None:
    with pytest.raises(InputError, match=r"model must be a folder that exists, got .*/nowhere"):
        load(str(tmp_path / "nowhere"))


def test_small_model_that_is_not_installed_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("real.models.names.SMALL_FOLDER", tmp_path / "small")
    with pytest.raises(InputError, match=r"with a config.json, got .*/small without one"):
        load(SMALL_NAME)


def test_catalogue_name_needs_random_weights() -> None:
    with pytest.raises(InputError, match=r"give --random-weights\), got the catalogue name 'olmoe-1b-7b'"):
        load("olmoe-1b-7b")


def test_random_weights_do_not_go_with_a_checkpoint(tmp_path) -> None:
    with pytest.raises(InputError, match="random-weights must go with a catalogue model"):
        load(str(tmp_path), random_weights=True)


def test_random_weights_take_their_dimensions_from_a_file(tmp_path) -> None:
    spec = tiny.SPECS["olmoe"].model_copy(update={"name": "olmoe-of-mine"})
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(spec.model_dump(exclude_none=True)), encoding="utf-8")
    loaded = load(str(file), random_weights=True)
    assert loaded.spec == spec.in_dtype("fp32")
    assert loaded.family.model_type == "olmoe"
    assert random_spec(str(file)) == spec
    with pytest.raises(InputError, match=r"give --random-weights\), got the TOML file '.*mine.toml'"):
        load(str(file))
    file.write_text("layers = 0", encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.toml: "):
        load(str(file), random_weights=True)


def test_plain_experts_with_biases_are_refused_and_the_families_named() -> None:
    rule = r"must have gated experts, .* got 'nllb-moe-54b' with 2 matrices and 10240 .* \(supported families: qwen3_"
    for look_up in (load, dimensions):
        with pytest.raises(InputError, match=rule):
            look_up("nllb-moe-54b", random_weights=True)


def test_dimensions_are_read_from_the_configuration_alone(tmp_path) -> None:
    tiny.model("deepseek_v2").config.save_pretrained(tmp_path)
    wanted = tiny.SPECS["deepseek_v2"].in_dtype("bf16")
    found = dimensions(str(tmp_path), dtype="bf16")
    assert found == wanted.model_copy(update={"name": tmp_path.name, "source": found.source})
    assert dimensions("olmoe-1b-7b", random_weights=True) == catalogue.model("olmoe-1b-7b").in_dtype("fp32")
    with pytest.raises(InputError, match="got the catalogue name"):
        dimensions("olmoe-1b-7b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", "num_experts": []}))
    for read in (dimensions, load):
        with pytest.raises(
            InputError, match=r"must be a checkpoint that transformers can load, got: .*'num_experts'.*int"
        ):
            read(str(tmp_path))


def test_too_little_memory_is_not_told_as_a_broken_checkpoint(tmp_path) -> None:
    with pytest.raises(MemoryError), _as_input_error(tmp_path):
        raise MemoryError


def test_broken_checkpoints_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"with a config.json, got .* without one"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(InputError, match="must be JSON with a model_type"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="got 'llama'"):
        load(str(tmp_path))
    tiny.model().config.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"must hold model\.safetensors or model\.safetensors\.index\.json, got neither"
    ):
        load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(InputError, match=r"model\.safetensors must be a whole safetensors file, got: "):
        load(str(tmp_path))


def test_missing_weights_are_not_made_up(tmp_path, caplog) -> None:
    tiny.model().model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"got none for model\.norm\.weight"):
        load(str(tmp_path))


@pytest.mark.skipif(
    not (SMALL_FOLDER / "model.safetensors").is_file(), reason="the small model is not in this checkout"
)
def test_shipped_model_loads_and_decodes() -> None:
    loaded = load(SMALL_NAME, with_experts=True)
    assert loaded.spec == dimensions(SMALL_NAME)
    assert loaded.spec == catalogue.model(SMALL_NAME).model_copy(update={"source": loaded.spec.source})
    assert loaded.spec.moe_layers >= 8
    assert loaded.spec.experts >= 16
    assert loaded.tokenizer is not None
    prompt = list(loaded.tokenizer("The history of the")["input_ids"])
    assert len(tiny.greedy(loaded, [prompt], 3)[0]) == 3


def test_a_model_that_does_not_fit_the_host_is_refused_before_it_is_built() -> None:
    spec = catalogue.model("mixtral-8x22b")
    with pytest.raises(InputError, match=r"model must fit the host's free memory .* GB of bf16 weights"):
        load_spec(spec.model_copy(update={"layers": 5600, "moe_layers": 5600}), dtype="bf16")
