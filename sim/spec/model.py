"""ModelSpec: the dimensions of a Mixture-of-Experts model, and the bytes and FLOPs that follow from them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from traces.errors import InputError, unknown_name
from traces.limits import MOST_EXPERT_BYTES

MOST = 10**12
"""Of every count: what is beyond is a slip, and products of counts have to stay numbers that work with others."""

Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]

LATER = ("query_head_dim", "context_costs")
"""Fields that are written down only where they say something."""

BITS_PER_WEIGHT: dict[str, float] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    "int8": 8.25,
    "int4": 4.25,
    "q4_k": 4.5,
    "mxfp4": 4.25,
}
"""Bits a weight takes on average; int8 and int4 count the bf16 scales of groups of 64, as :mod:`real.quant` keeps them,
mxfp4 the 8-bit scales of groups of 32."""


class ModelSpec(BaseModel):
    """A model's dimensions. Every field is a count, or a number of elements; bytes are derived."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    source: str = Field(description="where the dimensions were read")
    layers: Count = Field(description="decoder layers, dense ones included")
    moe_layers: Count
    experts: Count = Field(description="routed experts in an MoE layer")
    top_k: Count
    hidden: Count
    expert_width: Count
    expert_matrices: Count = Field(
        default=3, description="matrices of a feed-forward part, routed or not: 3 for gated ones, 2 for plain ones"
    )
    expert_biases: CountOrZero = Field(default=0, description="bias elements of one expert")
    shared_width: CountOrZero = Field(default=0, description="summed width of the shared experts of a layer")
    dense_width: CountOrZero = Field(default=0, description="feed-forward width of a dense layer")
    heads: Count
    kv_heads: Count
    head_dim: Count = Field(description="width of a head's value, and of its query and key unless query_head_dim says")
    query_head_dim: CountOrZero = Field(
        default=0, description="width of a head's query and key where it has a rotary part of its own; 0: head_dim"
    )
    projection_elements: CountOrZero = Field(
        default=0, description="attention weights of a layer, its mean over all; 0: those of the grouped-query form"
    )
    kv_elements: CountOrZero = Field(
        default=0, description="KV elements a token and layer, the mean over all; 0: 2 * kv_heads * head_dim"
    )
    vocab: Count
    tied_embeddings: bool = False
    dtype: str = Field(default="bf16", description="of everything outside the experts")
    expert_bits: PositiveFloat = Field(
        default=16.0, le=MOST, description="bits a weight of a routed expert; its biases are kept in dtype"
    )
    context_costs: bool = Field(
        default=True, description="whether attending to a context, and reading its KV cache, takes time"
    )

    @model_serializer(mode="wrap")
    def _told(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Models without the later fields keep their digest, and that of their profiles."""
        defaults = {name: type(self).model_fields[name].default for name in LATER}
        return {name: value for name, value in fields(self).items() if name not in defaults or value != defaults[name]}

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in BITS_PER_WEIGHT:
            raise unknown_name("dtype", value, BITS_PER_WEIGHT)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        for part, whole in (("moe_layers", "layers"), ("top_k", "experts")):
            if getattr(self, part) > getattr(self, whole):
                raise InputError(f"{part} must be at most {whole} {getattr(self, whole)}, got {getattr(self, part)}")
        if self.expert_bytes > MOST_EXPERT_BYTES:
            raise InputError(f"expert_bytes must be at most {MOST_EXPERT_BYTES}, got {self.expert_bytes}")
        return self

    @property
    def key_dim(self) -> int:
        """Width of a head's query and key."""
        return self.query_head_dim or self.head_dim

    @property
    def bytes_per_element(self) -> float:
        return BITS_PER_WEIGHT[self.dtype] / 8

    @property
    def expert_elements(self) -> int:
        """Weights and biases of one routed expert."""
        return self.expert_matrices * self.hidden * self.expert_width + self.expert_biases

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert as it is stored and copied."""
        weights = self.expert_elements - self.expert_biases
        return round(weights * self.expert_bits / 8 + self.expert_biases * self.bytes_per_element)

    @property
    def attention_elements(self) -> int:
        """Weights of one layer's attention projections; multi-head latent attention states its own number."""
        return self.projection_elements or self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def moe_layer_elements(self) -> int:
        """Weights of an MoE layer outside its routed experts: attention, router, shared experts, two norms."""
        return self.attention_elements + self.hidden * (self.experts + self.expert_matrices * self.shared_width + 2)

    @property
    def dense_layer_elements(self) -> int:
        """Weights of a layer without experts: attention, feed-forward, two norms."""
        return self.attention_elements + self.hidden * (self.expert_matrices * self.dense_width + 2)

    @property
    def dense_elements(self) -> int:
        """Weights outside the routed experts in the whole model, embeddings included."""
        dense = (self.layers - self.moe_layers) * self.dense_layer_elements
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return dense + self.moe_layers * self.moe_layer_elements + embeddings + self.hidden

    @property
    def total_elements(self) -> int:
        """Weights of the whole model, routed experts included: its parameter count."""
        return self.dense_elements + self.moe_layers * self.experts * self.expert_elements

    @property
    def dense_bytes(self) -> int:
        """Bytes on the GPU that no offloading policy moves."""
        return round(self.dense_elements * self.bytes_per_element)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token adds, over all layers."""
        elements = self.kv_elements or 2 * self.kv_heads * self.head_dim
        return round(self.layers * elements * self.bytes_per_element)

    def with_experts_in(self, quant: str) -> ModelSpec:
        """The same model with its routed experts stored as ``quant``, a key of :data:`BITS_PER_WEIGHT`."""
        return self.model_copy(update={"expert_bits": BITS_PER_WEIGHT[quant]})

    def in_dtype(self, dtype: str) -> ModelSpec:
        """The same model with all its weights in ``dtype``."""
        return self.model_copy(update={"dtype": dtype, "expert_bits": BITS_PER_WEIGHT[dtype]})
