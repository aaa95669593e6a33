"""Switch Transformers: an encoder and a decoder, one expert a token, a capacity, experts of two matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from real.models.expert import ExpertForm, Weights, plain_form
from real.models.families.base import Family, MoeLayer, require
from real.models.switch import DECODER, ENCODER, SwitchModel
from sim.spec import ModelSpec


@dataclass(frozen=True)
class Switch(Family):
    """Switch: the encoder's MoE layers come first, then the decoder's; a :class:`ModelSpec` has means over both stacks.

    A dimension of the specs is the same in both stacks, so that only stacks of the same depth are built from one. Its
    relative positions leave only transformers' own attention. Weights are the softmax's in the router's dtype.
    """

    width_field: str = "d_ff"
    router_name: str = "router"
    attention: str = "eager"

    def build(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        eager = {"attn_implementation": self.attention, "experts_implementation": "eager"}
        return SwitchModel._from_config(config, dtype=dtype, **eager)

    def encoder_layers(self, config: PretrainedConfig) -> int:
        return _sparse(config.num_layers, config.encoder_sparse_step)

    def moe_layers(self, model: PreTrainedModel) -> list[MoeLayer]:
        assert isinstance(model, SwitchModel), "it was built here"
        blocks = [block for stack in (ENCODER, DECODER) for block in model.sparse_blocks(stack)]
        return [MoeLayer(i, one, one.router, one.experts) for i, one in enumerate(blocks)]

    def spec(self, config: PretrainedConfig, name: str) -> ModelSpec:
        inner, decoder = config.num_heads * config.d_kv, config.num_decoder_layers
        layers = config.num_layers + decoder
        return ModelSpec(
            name=name,
            source="the model's config",
            layers=layers,
            moe_layers=self.encoder_layers(config) + _sparse(decoder, config.decoder_sparse_step),
            experts=config.num_experts,
            top_k=1,
            hidden=config.d_model,
            expert_width=config.d_ff,
            expert_matrices=2,
            dense_width=config.d_ff,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=config.d_kv,
            projection_elements=-(-4 * config.d_model * inner * (layers + decoder) // layers),
            kv_elements=-(-2 * inner * decoder // layers),
            vocab=config.vocab_size,
            tied_embeddings=config.tie_word_embeddings,
        )

    def config(self, spec: ModelSpec) -> PretrainedConfig:
        self._check(spec)
        config = AutoConfig.for_model(
            self.model_type,
            num_layers=spec.layers // 2,
            num_decoder_layers=spec.layers // 2,
            num_sparse_encoder_layers=spec.moe_layers // 2,
            num_sparse_decoder_layers=spec.moe_layers // 2,
            num_experts=spec.experts,
            d_model=spec.hidden,
            d_ff=spec.expert_width,
            num_heads=spec.heads,
            d_kv=spec.head_dim,
            vocab_size=spec.vocab,
            tie_word_embeddings=spec.tied_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            decoder_start_token_id=0,
        )
        require(2 * self.encoder_layers(config) == spec.moe_layers, self, "MoE layers at a regular distance", spec)
        return config

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.softmax(dim=-1).gather(-1, ids)

    def form(self, config: PretrainedConfig) -> ExpertForm:
        return plain_form(ACT2FN[config.dense_act_fn], config.d_model, config.d_ff)

    def experts_tensors(self, experts: nn.Module, expert: int) -> Weights:
        return tuple(experts.get_parameter(f"expert_{expert}.{name}.weight") for name in ("wi", "wo"))

    def _check(self, spec: ModelSpec) -> None:
        inner = spec.heads * spec.head_dim
        require(spec.expert_matrices == 2 and not spec.expert_biases, self, "experts of two matrices", spec)
        require(spec.top_k == 1, self, "one expert a token", spec)
        require(not spec.shared_width, self, "no shared experts", spec)
        require(spec.dense_width in (0, spec.expert_width), self, "dense layers as wide as an expert", spec)
        halves = spec.layers % 2 == 0 and spec.moe_layers % 2 == 0
        require(halves, self, "an encoder and a decoder alike", spec)
        attention = spec.kv_heads == spec.heads and spec.kv_elements == inner
        attention = attention and spec.projection_elements == 6 * spec.hidden * inner
        require(attention, self, "whole heads, and cross-attention in its decoder", spec)


def _sparse(layers: int, step: int) -> int:
    """MoE layers of a stack: the second of every ``step``, or all where that is 1; none where it is 0."""
    return sum(step == 1 or i % step == 1 for i in range(layers)) if step > 0 else 0
