"""Least recently used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class Lru(EvictionPolicy):
    """Evicts the block whose last use lies furthest back, in events of the whole model."""

    name: ClassVar[str] = "lru"
    by_recency: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._last_use = [-1] * (context.layers * context.experts)

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        for block in blocks:
            self._last_use[block] = event

    def key(self, block: int) -> float:
        return self._last_use[block]

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        return [*map(self._last_use.__getitem__, blocks)]
