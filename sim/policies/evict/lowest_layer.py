"""Least-stale, as the lowest layer."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import EvictionPolicy


class LowestLayer(EvictionPolicy):
    """Evicts the block of the lowest layer, the least recently used of it; within a layer's own pool this is LRU.

    Source: Least-Stale of SpecMD, arXiv 2602.03921, in the third of four public readings.
    """

    name: ClassVar[str] = "lowest-layer"

    def key(self, block: int) -> float:
        return block // self.context.experts
