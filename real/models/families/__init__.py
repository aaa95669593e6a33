"""The Mixture-of-Experts families of transformers behind one face: their routers, their experts and their rules."""

from __future__ import annotations

from real.models.families.base import Family, MoeLayer
from real.models.families.deepseek import DeepseekV2, DeepseekV3
from real.models.families.gpt_oss import GptOss
from real.models.families.softmax import Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from real.models.families.switch import Switch
from sim.spec import ModelSpec
from traces.errors import InputError

__all__ = ["FAMILIES", "Family", "MoeLayer", "family", "family_for", "supported"]

FAMILIES: dict[str, Family] = {
    "qwen3_moe": Qwen3Moe("qwen3_moe"),
    "olmoe": Olmoe("olmoe"),
    "mixtral": Mixtral("mixtral"),
    "qwen2_moe": Qwen2Moe("qwen2_moe"),
    "deepseek_v2": DeepseekV2("deepseek_v2"),
    "deepseek_v3": DeepseekV3("deepseek_v3"),
    "gpt_oss": GptOss("gpt_oss"),
    "switch_transformers": Switch("switch_transformers"),
}
"""The supported families, by the ``model_type`` of their configuration."""


def supported() -> str:
    """The supported families, for messages."""
    return f"supported families: {', '.join(FAMILIES)}"


def family(model_type: str) -> Family:
    """The family called ``model_type``; raises :class:`InputError` naming it and the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]


def family_for(spec: ModelSpec) -> Family:
    """The family that a model of these dimensions is built in: the one its name starts with, else one that fits.

    Plain experts of two matrices need ``switch_transformers``, experts with biases ``gpt_oss``, latent attention
    ``deepseek_v2``, shared experts ``qwen2_moe``; everything else is built as ``qwen3_moe``: a stand-in of the same
    dimensions where transformers has another architecture.
    Raises :class:`InputError` for experts of two matrices with biases, which are those of NLLB.
    """
    if spec.expert_matrices == 2 and not spec.expert_biases:
        return FAMILIES["switch_transformers"]
    if spec.expert_matrices != 3:
        told = f"{spec.name!r} with {spec.expert_matrices} matrices and {spec.expert_biases} biases an expert"
        rule = "gated experts, or plain ones without biases, to be run"
        raise InputError(f"model must have {rule}, got {told} ({supported()})")
    name = spec.name.lower().replace("-", "_")
    for model_type in ("mixtral", "olmoe", "gpt_oss", "deepseek_v3"):
        if name.startswith(model_type):
            return FAMILIES[model_type]
    if spec.expert_biases:
        return FAMILIES["gpt_oss"]
    if spec.kv_elements:
        return FAMILIES["deepseek_v2"]
    return FAMILIES["qwen2_moe" if spec.shared_width else "qwen3_moe"]
