"""A model, and points of a profile of it, by hand."""

from __future__ import annotations

from typing import Any

from sim.spec import HostSpec, ModelSpec
from sim.spec.profile import DensePoint, Point, Profile

SPEC = ModelSpec(
    name="by-hand", source="test", layers=2, moe_layers=2, experts=8, top_k=2, hidden=32, expert_width=16, heads=4,
    kv_heads=2, head_dim=8, vocab=64, dtype="fp32", expert_bits=32,
)  # fmt: skip


def point(size: int, value_s: float) -> Point:
    return Point(size=size, value_s=value_s, median_s=value_s, p90_s=value_s, repeats=3)


def profile(**fields: Any) -> Profile:
    """A profile in which a pass of one token takes a second for each part of it, and 8 s for a copy."""
    dense = DensePoint(tokens=1, base_s=1, per_context_s=0, least_context=1, most_context=99, p90_s=1, repeats=3)
    given: dict[str, Any] = {
        "name": "here", "device": "cpu", "date": "2026-01-01", "machine": {}, "model": SPEC, "token_s": 1.0,
        "host": HostSpec(source="test", layer_s=0.0, readback_s=0.0, controller_s=0.0, operation_s=0.0),
        "copies": (point(SPEC.expert_bytes, 8.0),), "gpu_expert": (point(1, 1.0),), "dense": (dense,),
        "cpu_expert_first": (point(1, 1.0),), "cpu_expert_later": (point(1, 1.0),), "head": (point(1, 1.0),),
        "lookahead_s": 0.0, **fields,
    }  # fmt: skip
    return Profile(**given)
