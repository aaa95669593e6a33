"""The families whose router is a softmax over all experts: Qwen2-MoE, Qwen3-MoE, OLMoE and Mixtral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from real.models.families.base import Family, positive, require
from sim.spec import ModelSpec


@dataclass(frozen=True)
class _SparseStep(Family):
    """Families whose dense layers are listed (``mlp_only_layers``) or regular (``decoder_sparse_step``)."""

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        positive(config, "decoder_sparse_step")
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
        require(spec.shared_width > 0, self, "a shared expert", spec)
        super()._check(spec.model_copy(update={"moe_layers": spec.layers, "shared_width": 0}))


@dataclass(frozen=True)
class Olmoe(Family):
    """OLMoE: softmax, the chosen weights as they are, norms over all heads at once."""

    width_field: str = "intermediate_size"

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.width_field: spec.expert_width}

    def _check(self, spec: ModelSpec) -> None:
        super()._check(spec)
        require(spec.heads * spec.head_dim == spec.hidden, self, "heads * head_dim equal to hidden", spec)


@dataclass(frozen=True)
class Mixtral(Family):
    """Mixtral: softmax, the chosen weights always normalised, and in fp32 whatever the model's dtype."""

    width_field: str = "intermediate_size"

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        weights = logits.float().softmax(dim=-1).gather(-1, ids)
        return weights / weights.sum(dim=-1, keepdim=True)
