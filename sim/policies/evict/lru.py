"""Least recently used."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import EvictionPolicy


class Lru(EvictionPolicy):
    """Evicts the block whose last use lies furthest back, in events of the whole model.

    All keys are equal: equal keys leave least recently used first.
    """

    name: ClassVar[str] = "lru"
    by_recency: ClassVar[bool] = True

    def key(self, block: int) -> float:
        return 0.0
