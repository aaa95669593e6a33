"""Tiny random models of every family, and a byte-level tokenizer, for the tests of real."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
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
_LATENT = 32 * 20 + 16 * 4 * 16 + 32 * 32  # all but the query's
_DEEPSEEK = {"layers": 3, "dense_width": 24, "kv_heads": 4, "query_head_dim": 12, "kv_elements": 20, "shared_width": 32}
SPECS: dict[str, ModelSpec] = {
    model_type: ModelSpec(name=f"tiny-{model_type}", **{**_BASE, **fields})
    for model_type, fields in {
        "qwen3_moe": {"layers": 3, "dense_width": 24, "head_dim": 16, "tied_embeddings": True},
        "olmoe": {},
        "mixtral": {"head_dim": 16},
        "qwen2_moe": {"shared_width": 24},
        "deepseek_v2": {**_DEEPSEEK, "projection_elements": _LATENT + 32 * 4 * 12},
        "deepseek_v3": {**_DEEPSEEK, "projection_elements": _LATENT + 16 * (32 + 4 * 12)},
        "gpt_oss": {"head_dim": 16, "expert_biases": 2 * 16 + 32},
        "switch_transformers": {
            "layers": 4,
            "top_k": 1,
            "expert_matrices": 2,
            "dense_width": 16,
            "kv_heads": 4,
            "kv_elements": 32,
            "projection_elements": 6 * 32 * 32,
            "tied_embeddings": True,
        },
    }.items()
}
"""A spec for each family; qwen3_moe, both of deepseek, and both stacks of switch begin with a dense layer."""

DECODERS = [name for name in SPECS if name != "switch_transformers"]
"""The families that have no encoder."""
CAPACITY = 2
"""Tokens of a sequence that an expert of switch takes."""


@cache
def model(model_type: str = "qwen3_moe", layers: int | None = None) -> LoadedModel:
    """A tiny model with all its experts, whose routers and logits are far from ties; shared, so do not change it."""
    spec = SPECS[model_type]
    if layers is not None:
        spec = spec.model_copy(update={"layers": layers, "moe_layers": layers})
    loaded = load_spec(spec, model_type=model_type, with_experts=True, seed=3)
    small: nn.Module = loaded.model
    if loaded.encoder_layers:  # whose other weights are large from the start
        small = nn.ModuleList(layer.experts for layer in loaded.layers)
        loaded.config.expert_capacity = CAPACITY
        for layer in loaded.layers:
            layer.router.expert_capacity = CAPACITY  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        for name, buffer in loaded.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
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


def best_two(router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """The experts [T, 2] that a router is to choose under its ``logits`` [T, 8], by descending weight.

    For DeepSeek-V3 worked out by hand: four groups of two, of which two are open; scores with the bias choose.
    """
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        return logits.topk(2, dim=-1).indices
    scores = logits.sigmoid()
    pairs = (scores + bias).view(-1, 4, 2)
    closed = pairs.sum(-1).argsort(-1)[:, :2]
    opened = pairs.scatter(1, closed[..., None].expand(-1, -1, 2), -9.0).flatten(1)
    ids = opened.argsort(-1, descending=True)[:, :2]
    return ids.gather(1, scores.gather(1, ids).argsort(-1, descending=True))


def logits_of(loaded: LoadedModel, prompts: list[list[int]], forced: list[list[int]], **options: Any) -> torch.Tensor:
    """Logits [steps, B, V] of prompts followed by forced tokens."""
    return torch.stack(
        generate(loaded.model, *left_pad(prompts), forced_tokens=forced, keep_logits=True, **options).logits
    )


def greedy(loaded: LoadedModel, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """New tokens of every lane, decoded greedily."""
    options = {"sampler": Sampler(), **options}
    return generate(loaded.model, *left_pad(prompts), max_new_tokens=count, **options).tokens
