"""Compute what is not resident on the CPU, and move nothing."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class StaticPlacement(PlacementPolicy):
    """Runs the resident set on the GPU and every other expert on the CPU; no expert is fetched, at no time.

    The resident set is what was loaded before the first step, so that it goes with an eviction policy that preloads:
    from an empty cache everything runs on the CPU. Source: the fixed split of KTransformers (SOSP 2025), without its
    deferral of experts.
    """

    name: ClassVar[str] = "static"

    def place(self, view: LayerView) -> Assignment:
        return split(view, [expert for expert, _ in view.misses])
