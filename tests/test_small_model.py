"""The shipped checkpoint: its size, its shape, what its card says, and that it models text of every kind it learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from real.models.card import render_card
from real.models.evaluate import neighbour_overlap

FOLDER = Path(__file__).resolve().parent.parent / "real" / "models" / "small"

TEXTS = {
    "speech": "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil "
    "war, testing whether that nation, or any nation so conceived and so dedicated, can long endure.",
    "code": "def mean_of(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    if not values:\n        raise ValueError('values must not be empty')\n    return total / len(values)\n",
    "documentation": "The function opens the file for reading and returns its contents as a string. If the file does "
    "not exist, an exception is raised. The optional argument sets the encoding; the default is UTF-8.",
    "dictionary": 'Lantern \\Lan"tern\\, n. [F. lanterne.]\n   A case of glass or horn in which a light is carried '
    "to protect it from the wind.\n",
    "essay": "Those who work in a place know best how it should be run, and it is a mistake to believe that a few "
    "people at the top can decide for all the others without doing harm to their freedom.",
    "play": "KING.\nWhat news, my lord? Why dost thou look so pale?\n\nMESSENGER.\nMy gracious liege, the enemy is "
    "at the gate,\nAnd all thy soldiers fled into the night.\n",
    "novel": "The old sailor looked out upon the sea, and for a long while he said nothing; then he turned to the "
    "captain and pointed with his pipe at the white water that broke upon the rocks.",
}


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_it_is_small_enough_to_ship() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 24_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25_000_000


def test_its_weights_are_stored_in_bfloat16() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_it_has_the_shape_the_project_needs(model: Any) -> None:
    config = model.config
    assert config.model_type == "qwen3_moe"
    assert config.num_hidden_layers >= 8
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2
    assert config.max_position_embeddings >= 1024
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers)


def test_the_card_says_what_the_figures_say(figures: dict[str, Any]) -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == render_card(figures)


def test_the_figures_describe_these_weights(figures: dict[str, Any], model: Any) -> None:
    assert figures["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert figures["weights_bytes"] == (FOLDER / "model.safetensors").stat().st_size
    recipe, config = figures["recipe"], model.config
    assert (recipe["layers"], recipe["experts"], recipe["top_k"]) == (
        config.num_hidden_layers,
        config.num_experts,
        config.num_experts_per_tok,
    )


def test_the_recorded_losses_beat_the_unigram_in_every_domain(figures: dict[str, Any]) -> None:
    domains = figures["evaluation"]["domains"]
    assert len(domains) >= 6
    assert [name for name, entry in domains.items() if entry["loss"] >= entry["unigram_loss"]] == []


def test_the_recorded_routing_is_balanced_and_local(figures: dict[str, Any]) -> None:
    overall = figures["evaluation"]["overall"]
    assert overall["load_max_over_mean"] <= 3.0
    assert overall["unused_experts"] == 0
    assert overall["lru_25"] - overall["lru_25_shuffled"] >= 0.08


@torch.no_grad()
def test_it_models_every_kind_of_text(model: Any, tokenizer: Any) -> None:
    limit = math.log(model.config.vocab_size) - 2.0
    losses = {}
    for kind, text in TEXTS.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses[kind] = float(model(input_ids=ids, labels=ids).loss)
    assert {kind: loss for kind, loss in losses.items() if loss > limit} == {}


@torch.no_grad()
def test_neighbouring_tokens_share_experts_more_than_chance(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS["speech"] + "\n" + TEXTS["novel"], return_tensors="pt")["input_ids"]
    k, experts = model.config.num_experts_per_tok, model.config.num_experts
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    overlaps = [neighbour_overlap(torch.topk(layer, k, dim=-1).indices.numpy()) for layer in logits]
    assert sum(overlaps) / len(overlaps) > k / experts


def test_greedy_generation_is_deterministic(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("The President of the United States", return_tensors="pt", return_token_type_ids=False)
    runs = [model.generate(**inputs, do_sample=False, max_new_tokens=16) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape[1] > inputs["input_ids"].shape[1]


def test_the_tokenizer_is_lossless_and_marks_the_beginning(tokenizer: Any) -> None:
    text = TEXTS["code"] + "ünïcödé ☃\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
