"""GPT-OSS: experts with biases and a clamped gate, attention sinks, a sliding window in every second layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from real.models.expert import ExpertForm, Weights, clamped_form
from real.models.families.base import Family, require
from sim.spec import ModelSpec


@dataclass(frozen=True)
class GptOss(Family):
    """GPT-OSS: softmax over the chosen experts only. Its attention sinks leave only transformers' own attention.

    The clamp of the gate is the configuration's where it names one, else the published one, which older releases of
    transformers have built in.
    """

    width_field: str = "intermediate_size"
    experts_field: str = "num_local_experts"
    router_name: str = "router"
    attention: str = "eager"

    def gates(self, config: PretrainedConfig, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.gather(-1, ids).softmax(dim=-1)

    def form(self, config: PretrainedConfig) -> ExpertForm:
        alpha, limit = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
        return clamped_form(config.hidden_size, config.intermediate_size, alpha, limit)

    def experts_tensors(self, experts: nn.Module, expert: int) -> Weights:
        matrices = ("gate_up_proj", "down_proj")
        names = (*matrices, *(f"{name}_bias" for name in matrices))
        return tuple(experts.get_parameter(name)[expert] for name in names)

    def _spec_fields(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"expert_biases": 2 * config.intermediate_size + config.hidden_size}

    def _check(self, spec: ModelSpec) -> None:
        biases = 2 * spec.expert_width + spec.hidden
        require(spec.expert_biases == biases, self, "a bias for gate, up and down in every expert", spec)
        super()._check(spec.model_copy(update={"expert_biases": 0}))
