"""What the families share: where a model's routers and experts are, its dimensions, and its router's rule.

Shapes: T tokens, E experts a layer, k experts a token, H hidden width, I expert width. Most families have the fused
layout of transformers 5: a block with a router module ``gate`` that returns (logits [T, E], weights [T, k],
indices [T, k]), and a module ``experts`` with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from real.models.expert import ExpertForm, Weights, gated_form
from sim.spec import ModelSpec
from traces.errors import InputError


@dataclass(frozen=True)
class MoeLayer:
    """The modules of one MoE layer; ``index`` counts MoE layers only, from 0."""

    index: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module


@dataclass(frozen=True)
class Family:
    """What the families share; a family that differs overrides the method or the field.

    ``model_type`` is that of its config, ``router_name`` the router's name in an MoE block, ``attention`` the
    implementation of attention that transformers has for it on every device.
    """

    model_type: str
    width_field: str = "moe_intermediate_size"
    experts_field: str = "num_experts"
    router_name: str = "gate"
    attention: str = "sdpa"

    def build(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """A model of that configuration, its weights on the device that torch's context names."""
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)

    def encoder_layers(self, config: PretrainedConfig) -> int:
        """How many of the MoE layers, the first ones, are an encoder's."""
        return 0

    def moe_layers(self, model: PreTrainedModel) -> list[MoeLayer]:
        """The MoE layers of ``model``, first to last; dense layers are left out."""
        blocks = [block for layer in model.get_decoder().layers for block in layer.children() if self._is_moe(block)]
        return [MoeLayer(i, one, one.get_submodule(self.router_name), one.experts) for i, one in enumerate(blocks)]

    def spec(self, config: PretrainedConfig, name: str) -> ModelSpec:
        """The dimensions in ``config``, as a :class:`ModelSpec` called ``name`` with all weights in bf16.

        Raises :class:`InputError` for a configuration that transformers builds a model of which cannot run.
        """
        positive(config, "num_attention_heads")
        moe_layers = self._moe_layer_count(config)
        fields: dict[str, Any] = {
            "layers": config.num_hidden_layers,
            "moe_layers": moe_layers,
            "experts": getattr(config, self.experts_field),
            "top_k": config.num_experts_per_tok,
            "hidden": config.hidden_size,
            "expert_width": getattr(config, self.width_field),
            "dense_width": config.intermediate_size if moe_layers < config.num_hidden_layers else 0,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "vocab": config.vocab_size,
            "tied_embeddings": config.tie_word_embeddings,
        }
        return ModelSpec(name=name, source="the model's config", **{**fields, **self._spec_fields(config)})

    def config(self, spec: ModelSpec) -> PretrainedConfig:
        """The family's configuration at the dimensions of ``spec``.

        Raises :class:`InputError` when the family's architecture cannot have these dimensions.
        """
        self._check(spec)
        fields = {
            "num_hidden_layers": spec.layers,
            self.experts_field: spec.experts,
            "num_experts_per_tok": spec.top_k,
            "hidden_size": spec.hidden,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.kv_heads,
            "vocab_size": spec.vocab,
            "tie_word_embeddings": spec.tied_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        return AutoConfig.for_model(self.model_type, **{**fields, **self._config_fields(spec)})

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        """The weights [T, k] that the family's rule gives the experts ``ids`` [T, k] under router ``logits`` [T, E].

        For the router's own choice these are the router's own weights; for a forced choice, what it would have used.
        """
        weights = logits.float().softmax(dim=-1).gather(-1, ids)
        if config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype)

    def form(self, config: PretrainedConfig) -> ExpertForm:
        """The tensors of an expert and its arithmetic; its elements are those of :meth:`spec`."""
        return gated_form(ACT2FN[config.hidden_act], config.hidden_size, getattr(config, self.width_field))

    def experts_tensors(self, experts: nn.Module, expert: int) -> Weights:
        """Views of one expert's weights, in the order of its form."""
        return experts.get_parameter("gate_up_proj")[expert], experts.get_parameter("down_proj")[expert]

    def _is_moe(self, block: nn.Module) -> bool:
        return hasattr(block, self.router_name) and hasattr(block, "experts")

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        return int(config.num_hidden_layers)

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.width_field: spec.expert_width, "head_dim": spec.head_dim}

    def _check(self, spec: ModelSpec) -> None:
        require(spec.expert_matrices == 3 and not spec.expert_biases, self, "gated experts without biases", spec)
        require(not spec.kv_elements, self, "grouped-query attention", spec)
        require(not spec.shared_width, self, "no shared experts", spec)
        require(spec.moe_layers == spec.layers, self, "an MoE block in every layer", spec)


def positive(config: PretrainedConfig, *names: str) -> None:
    """Raises :class:`InputError` unless the fields ``names`` of ``config`` are counts of at least 1."""
    for name in names:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be at least 1, got {value!r}")


def require(condition: bool, owner: Family, rule: str, spec: ModelSpec) -> None:
    """Raises :class:`InputError` unless ``condition``: ``spec`` must have what ``rule`` says to be of ``owner``."""
    from real.models.families import supported  # not above: that module is made of what derives from this one

    if not condition:
        told = f"{spec.name!r} ({supported()})"
        raise InputError(f"model must have {rule} to be built as {owner.model_type}, got {told}")
