"""A model, and points of a profile of it, by hand."""

from __future__ import annotations

from sim.spec import ModelSpec
from sim.spec.profile import Point

SPEC = ModelSpec(
    name="by-hand", source="test", layers=2, moe_layers=2, experts=8, top_k=2, hidden=32, expert_width=16, heads=4,
    kv_heads=2, head_dim=8, vocab=64, dtype="fp32", expert_bits=32,
)  # fmt: skip


def point(size: int, value_s: float) -> Point:
    return Point(size=size, value_s=value_s, median_s=value_s, p90_s=value_s, repeats=3)
