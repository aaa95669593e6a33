"""Compute missing experts on the CPU instead of fetching them."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class CpuOnMiss(PlacementPolicy):
    """Runs missing experts on the CPU and leaves the cache as it is, once it is full.

    While the layer's slots are not all taken, the misses with the most tokens are fetched to fill them (chosen here,
    so that a run may start with an empty cache); after that only a prefetch changes what is resident.
    """

    name: ClassVar[str] = "cpu-on-miss"

    def place(self, view: LayerView) -> Assignment:
        return split(view, [expert for expert, _ in view.misses[view.free_slots :]])
