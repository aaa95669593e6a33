"""Layers to place, by hand and drawn at random, and the policies that place them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from sim.policies import PLACEMENT, LayerView, PlacementPolicy, PolicyContext
from sim.policies.place import HybriMoe, Optimal
from sim.policies.place.split import Scheduled

SCHEDULED = [name for name, kind in PLACEMENT.items() if issubclass(kind, Scheduled)]


def policy(name: str, **options: Any) -> PlacementPolicy:
    return PLACEMENT[name](PolicyContext(layers=1, experts=64, top_k=6, options=options))


def hybrimoe(**options: Any) -> HybriMoe:
    return HybriMoe(PolicyContext(layers=1, experts=64, top_k=6, options=options))


def optimal() -> Optimal:
    return Optimal(PolicyContext(layers=1, experts=64, top_k=6))


def view(
    hits: Mapping[int, int] | None = None,
    misses: Mapping[int, int] | None = None,
    late: Mapping[int, int] | None = None,
    *,
    gpu: float = 1.0,
    cpu: float = 1.0,
    first: float = 0.0,
    copy: float = 1.0,
    **fields: Any,
) -> LayerView:
    """A layer of expert -> tokens: ``gpu`` an expert, ``cpu`` a token and ``first`` once, ``copy`` a copy; prefetches
    arrive one after the other, in order of load."""

    def ordered(loads: Mapping[int, int] | None) -> tuple[tuple[int, int], ...]:
        return tuple(sorted((loads or {}).items(), key=lambda load: (-load[1], load[0])))

    prefetched = ordered(late)
    arrivals_s = tuple(copy * place for place in range(1, len(prefetched) + 1))
    given_fields = {"free_slots": 0, "late": prefetched, "arrivals_s": arrivals_s, **fields}
    costs = (lambda tokens: gpu), (lambda tokens, is_first: cpu * tokens + first * is_first)
    return LayerView(
        0, ordered(hits), ordered(misses), gpu_expert_s=costs[0], cpu_expert_s=costs[1], copy_s=copy, **given_fields
    )


@st.composite
def layers(draw: st.DrawFn, *, most: int = 6, prefetched: bool = True) -> LayerView:
    """Any small layer: loads, what is where, costs of a few odd numbers, and clocks that are already set."""
    second = st.sampled_from([0.3, 1.0, 1.7, 4.0])
    experts = draw(st.lists(st.integers(0, 63), max_size=most, unique=True))
    parts: tuple[dict[int, int], ...] = {}, {}, {}
    for expert in experts:
        parts[draw(st.integers(0, 2 if prefetched else 1))][expert] = draw(st.integers(1, 3))
    gpu_token = draw(st.sampled_from([0.0, 0.2]))
    layer = view(
        *parts, gpu=draw(second), cpu=draw(second), first=draw(st.sampled_from([0.0, 0.79])), copy=draw(second)
    )
    gpu_s: Callable[[int], float] = layer.gpu_expert_s
    return layer._replace(
        layer=draw(st.integers(0, 3)),
        free_slots=draw(st.integers(0, 3)),
        gpu_expert_s=lambda tokens: gpu_s(tokens) + gpu_token * tokens,
        gpu_free_s=draw(st.sampled_from([0.0, 2.0])),
        link_free_s=layer.copy_s * (len(parts[2]) + draw(st.integers(0, 1))),
    )
