"""Tiny random models of every family, and a byte-level tokenizer, for the tests of real."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from real.generate import Sampler, generate, left_pad
from real.models.load import LoadedModel, load_spec
from sim.spec import ModelSpec

VOCAB = 257
"""The 256 bytes and an end mark."""
END = 256

_BASE: dict[str, Any] = {
    "source": "test",
    "layers": 2,
    "moe_layers": 2,
    "experts": 8,
    "top_k": 2,
    "hidden": 32,
    "expert_width": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab": VOCAB,
    "dtype": "fp32",
    "expert_bits": 32,
}
_LATENT = 32 * 4 * 12 + 32 * 20 + 16 * 4 * 16 + 32 * 32
SPECS: dict[str, ModelSpec] = {
    model_type: ModelSpec(name=f"tiny-{model_type}", **{**_BASE, **fields})
    for model_type, fields in {
        "qwen3_moe": {"layers": 3, "dense_width": 24, "head_dim": 16, "tied_embeddings": True},
        "olmoe": {},
        "mixtral": {"head_dim": 16},
        "qwen2_moe": {"shared_width": 24},
        "deepseek_v2": {
            "layers": 3,
            "dense_width": 24,
            "kv_heads": 4,
            "kv_elements": 20,
            "shared_width": 32,
            "projection_elements": _LATENT,
        },
    }.items()
}
"""A spec for each family; qwen3_moe and deepseek_v2 begin with a dense layer."""


@cache
def model(model_type: str = "qwen3_moe", layers: int | None = None) -> LoadedModel:
    """A tiny model with all its experts, whose routers and logits are far from ties; shared, so do not change it."""
    spec = SPECS[model_type]
    if layers is not None:
        spec = spec.model_copy(update={"layers": layers, "moe_layers": layers})
    loaded = load_spec(spec, model_type=model_type, with_experts=True, seed=3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return replace(loaded, tokenizer=tokenizer())


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def logits_of(loaded: LoadedModel, prompts: list[list[int]], forced: list[list[int]], **options: Any) -> torch.Tensor:
    """Logits [steps, B, V] of prompts followed by forced tokens."""
    return torch.stack(
        generate(loaded.model, *left_pad(prompts), forced_tokens=forced, keep_logits=True, **options).logits
    )


def greedy(loaded: LoadedModel, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """New tokens of every lane, decoded greedily."""
    options = {"sampler": Sampler(), **options}
    return generate(loaded.model, *left_pad(prompts), max_new_tokens=count, **options).tokens
