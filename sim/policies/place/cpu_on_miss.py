"""Compute missing experts on the CPU instead of fetching them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import LayerView, PlacementPolicy


class CpuOnMiss(PlacementPolicy):
    """Runs missing experts on the CPU and leaves the cache as it is, once it is full.

    While the layer's slots are not all taken, the misses with the most tokens are fetched to fill them (chosen here,
    so that a run may start with an empty cache); after that only a prefetch changes what is resident.
    """

    name: ClassVar[str] = "cpu-on-miss"

    def on_cpu(self, view: LayerView) -> Sequence[int]:
        return [expert for expert, _ in view.misses[view.free_slots :]]
