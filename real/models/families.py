"""One face for the Mixture-of-Experts families of transformers: where their routers and experts are, and their rules.

Shapes: T tokens, E experts a layer, k experts a token, H hidden width, I expert width. The families here share the
fused layout of transformers 5: a block with a router module ``gate`` that returns (logits [T, E], weights [T, k],
indices [T, k]), and a module ``experts`` with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

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
    """What the families share; a family that differs overrides the method. ``model_type`` is that of its config."""

    model_type: str
    width_field: str = "moe_intermediate_size"

    def moe_layers(self, model: PreTrainedModel) -> list[MoeLayer]:
        """The MoE layers of ``model``, first to last; dense layers are left out."""
        blocks = [block for layer in model.get_decoder().layers for block in layer.children() if _is_moe(block)]
        return [MoeLayer(i, block, block.gate, block.experts) for i, block in enumerate(blocks)]

    def spec(self, config: PretrainedConfig, name: str) -> ModelSpec:
        """The dimensions in ``config``, as a :class:`ModelSpec` called ``name`` with all weights in bf16."""
        moe_layers = self._moe_layer_count(config)
        fields: dict[str, Any] = {
            "layers": config.num_hidden_layers,
            "moe_layers": moe_layers,
            "experts": config.num_experts,
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
            "num_experts": spec.experts,
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

    def experts_tensors(self, experts: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
        """Views of one expert's weights: gate and up [2I, H] (gate first), and down [H, I]."""
        gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
        return gate_up[expert], down[expert]

    def act_fn(self, config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """The activation that is applied to the gate half of an expert."""
        return ACT2FN[config.hidden_act]

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        return int(config.num_hidden_layers)

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.width_field: spec.expert_width, "head_dim": spec.head_dim}

    def _check(self, spec: ModelSpec) -> None:
        _require(spec.expert_matrices == 3 and not spec.expert_biases, self, "gated experts without biases", spec)
        _require(not spec.kv_elements, self, "grouped-query attention", spec)
        _require(not spec.shared_width, self, "no shared experts", spec)
        _require(spec.moe_layers == spec.layers, self, "an MoE block in every layer", spec)


@dataclass(frozen=True)
class _SparseStep(Family):
    """Families whose dense layers are listed (``mlp_only_layers``) or regular (``decoder_sparse_step``)."""

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        step, dense = config.decoder_sparse_step, set(config.mlp_only_layers)
        return sum(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        dense = {
            "mlp_only_layers": list(range(spec.layers - spec.moe_layers)),
            "intermediate_size": spec.dense_width or spec.expert_width,
            "norm_topk_prob": True,
        }
        return {**super()._config_fields(spec), **dense}


@dataclass(frozen=True)
class Qwen3Moe(_SparseStep):
    """Qwen3-MoE: softmax, the chosen weights normalised when the configuration says so, no shared expert."""

    def _check(self, spec: ModelSpec) -> None:
        super()._check(spec.model_copy(update={"moe_layers": spec.layers}))


@dataclass(frozen=True)
class Qwen2Moe(_SparseStep):
    """Qwen2-MoE: as Qwen3-MoE, with one shared expert behind a sigmoid of its own."""

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"shared_width": config.shared_expert_intermediate_size}

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": spec.shared_width, "norm_topk_prob": False}
        return {**super()._config_fields(spec), **shared}

    def _check(self, spec: ModelSpec) -> None:
        _require(spec.shared_width > 0, self, "a shared expert", spec)
        super()._check(spec.model_copy(update={"moe_layers": spec.layers, "shared_width": 0}))


@dataclass(frozen=True)
class Olmoe(Family):
    """OLMoE: softmax, the chosen weights as they are, norms over all heads at once."""

    width_field: str = "intermediate_size"

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.width_field: spec.expert_width}

    def _check(self, spec: ModelSpec) -> None:
        super()._check(spec)
        _require(spec.heads * spec.head_dim == spec.hidden, self, "heads * head_dim equal to hidden", spec)


@dataclass(frozen=True)
class Mixtral(Family):
    """Mixtral: softmax, the chosen weights always normalised, and in fp32 whatever the model's dtype."""

    width_field: str = "intermediate_size"

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        weights = logits.float().softmax(dim=-1).gather(-1, ids)
        return weights / weights.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class DeepseekV2(Family):
    """DeepSeek-V2: latent attention, shared experts, leading dense layers, weights scaled and never normalised.

    ``ModelSpec.head_dim`` is the width of a value head, and ``kv_elements`` the latent with the shared rotary key
    (the published 512 + 64), which is what transformers caches. A rotary key is taken as half a head wide, as it is
    in every published model of the family.
    """

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        weights = logits.softmax(dim=-1, dtype=torch.float32).gather(-1, ids)
        return weights * config.routed_scaling_factor

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        return int(config.num_hidden_layers - config.first_k_dense_replace)

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        query = config.q_lora_rank * (hidden + query_width) if config.q_lora_rank else hidden * query_width
        latent = hidden * (rank + config.qk_rope_head_dim)
        return {
            "shared_width": config.n_shared_experts * config.moe_intermediate_size,
            "head_dim": config.v_head_dim,
            "kv_elements": rank + config.qk_rope_head_dim,
            "projection_elements": query
            + latent
            + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
            + hidden * heads * config.v_head_dim,
        }

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        rope = spec.head_dim // 2
        return {
            self.width_field: spec.expert_width,
            "intermediate_size": spec.dense_width or spec.expert_width,
            "first_k_dense_replace": spec.layers - spec.moe_layers,
            "n_shared_experts": spec.shared_width // spec.expert_width,
            "q_lora_rank": self._query_rank(spec),
            "qk_nope_head_dim": spec.head_dim,
            "qk_rope_head_dim": rope,
            "v_head_dim": spec.head_dim,
            "kv_lora_rank": spec.kv_elements - rope,
        }

    def _query_rank(self, spec: ModelSpec) -> int | None:
        """The rank of the query's projection, solved from the number of projection weights; None for a full one."""
        rope = spec.head_dim // 2
        query_width = spec.heads * (spec.head_dim + rope)
        others = spec.hidden * (spec.kv_elements + spec.heads * spec.head_dim)
        others += (spec.kv_elements - rope) * spec.heads * 2 * spec.head_dim
        rank, rest = divmod(spec.attention_elements - others, spec.hidden + query_width)
        return rank if spec.projection_elements and rank > 0 and rest == 0 else None

    def _check(self, spec: ModelSpec) -> None:
        _require(spec.kv_elements > spec.head_dim // 2, self, "a latent KV cache", spec)
        whole = spec.shared_width > 0 and spec.shared_width % spec.expert_width == 0
        _require(whole, self, "shared experts of the routed experts' width", spec)
        super()._check(spec.model_copy(update={"moe_layers": spec.layers, "shared_width": 0, "kv_elements": 0}))


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Qwen3Moe("qwen3_moe"),
    "olmoe": Olmoe("olmoe"),
    "mixtral": Mixtral("mixtral"),
    "qwen2_moe": Qwen2Moe("qwen2_moe"),
    "deepseek_v2": DeepseekV2("deepseek_v2"),
}
"""The supported families, by the ``model_type`` of their configuration."""


def family(model_type: str) -> Family:
    """The family called ``model_type``; raises :class:`InputError` naming it and the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]


def family_for(spec: ModelSpec) -> Family:
    """The family that a model of these dimensions is built in: the one its name starts with, else one that fits.

    Latent attention needs ``deepseek_v2``, shared experts ``qwen2_moe``; everything else is built as ``qwen3_moe``.
    """
    name = spec.name.lower().replace("-", "_")
    for model_type in ("mixtral", "olmoe"):
        if name.startswith(model_type):
            return FAMILIES[model_type]
    if spec.kv_elements:
        return FAMILIES["deepseek_v2"]
    return FAMILIES["qwen2_moe" if spec.shared_width else "qwen3_moe"]


def _is_moe(block: nn.Module) -> bool:
    return hasattr(block, "gate") and hasattr(block, "experts")


def _require(condition: bool, owner: Family, rule: str, spec: ModelSpec) -> None:
    if not condition:
        known = f"supported families: {', '.join(FAMILIES)}"
        raise InputError(f"model must have {rule} to be built as {owner.model_type}, got {spec.name!r} ({known})")
