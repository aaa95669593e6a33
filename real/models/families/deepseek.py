"""DeepSeek-V2 and DeepSeek-V3: latent attention, shared experts, leading dense layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from real.models.families.base import Family, positive, require
from sim.spec import ModelSpec
from traces.errors import InputError, unknown_name

GROUPED = "group_limited_greedy"
_CHOICES = ("greedy", GROUPED)


@dataclass(frozen=True)
class DeepseekV2(Family):
    """DeepSeek-V2: latent attention, shared experts, leading dense layers, weights scaled and never normalised.

    ``ModelSpec.head_dim`` is the width of a value head, and ``kv_elements`` the latent with the shared rotary key
    (the published 512 + 64), which is what transformers caches. A rotary key is taken as half a head wide, as it is
    in every published model of the family.
    """

    experts_field: str = "n_routed_experts"

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        weights = logits.softmax(dim=-1, dtype=torch.float32).gather(-1, ids)
        return weights * config.routed_scaling_factor

    def _moe_layer_count(self, config: PretrainedConfig) -> int:
        return int(config.num_hidden_layers - config.first_k_dense_replace)

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        self._check_choice(config)
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        query = config.q_lora_rank * (hidden + query_width) if config.q_lora_rank else hidden * query_width
        latent = hidden * (rank + config.qk_rope_head_dim)
        return {
            "shared_width": config.n_shared_experts * config.moe_intermediate_size,
            "head_dim": config.v_head_dim,
            "query_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
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

    def _check_choice(self, config: PretrainedConfig) -> None:
        """Raises :class:`InputError` for a way to choose experts that transformers' router does not have."""
        if config.topk_method not in _CHOICES:
            raise unknown_name("topk_method", config.topk_method, _CHOICES)
        if config.topk_method == GROUPED:
            _check_groups(config)

    def _query_rank(self, spec: ModelSpec) -> int | None:
        """The rank of the query's projection, solved from the number of projection weights; None for a full one."""
        rope = spec.head_dim // 2
        query_width = spec.heads * (spec.head_dim + rope)
        others = spec.hidden * (spec.kv_elements + spec.heads * spec.head_dim)
        others += (spec.kv_elements - rope) * spec.heads * 2 * spec.head_dim
        rank, rest = divmod(spec.attention_elements - others, spec.hidden + query_width)
        return rank if spec.projection_elements and rank > 0 and rest == 0 else None

    def _check(self, spec: ModelSpec) -> None:
        require(spec.kv_elements > spec.head_dim // 2, self, "a latent KV cache", spec)
        whole = spec.shared_width > 0 and spec.shared_width % spec.expert_width == 0
        require(whole, self, "shared experts of the routed experts' width", spec)
        super()._check(spec.model_copy(update={"moe_layers": spec.layers, "shared_width": 0, "kv_elements": 0}))


@dataclass(frozen=True)
class DeepseekV3(DeepseekV2):
    """DeepSeek-V3: sigmoid scores, a bias that counts in the choice alone, experts chosen within the best groups.

    The chosen scores are normalised and scaled as the configuration says. Groups, and how many of them are open to a
    token, are no dimensions of a :class:`ModelSpec`: they are the published 8 and 4, or fewer where a group would have
    one expert, or the open ones fewer than a token chooses.
    """

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        weights = logits.float().sigmoid().gather(-1, ids)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor

    def _check_choice(self, config: PretrainedConfig) -> None:
        _check_groups(config)

    def _config_fields(self, spec: ModelSpec) -> dict[str, Any]:
        groups = next(count for count in (8, 4, 2, 1) if spec.experts % count == 0 and spec.experts >= 2 * count)
        few = groups // 2 * (spec.experts // groups) < spec.top_k
        return {**super()._config_fields(spec), "n_group": groups, "topk_group": groups if few else groups // 2}

    def _check(self, spec: ModelSpec) -> None:
        require(spec.experts > 1, self, "at least two experts", spec)
        super()._check(spec)


def _check_groups(config: PretrainedConfig) -> None:
    """Raises :class:`InputError` unless the experts are made of equal groups, of which enough are open to a token."""
    positive(config, "n_group", "topk_group")
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise InputError(f"n_group must divide the {experts} experts, got {groups}")
    if config.topk_group > groups:
        raise InputError(f"topk_group must be at most n_group {groups}, got {config.topk_group}")
