"""Least frequently used, counted while a block is resident."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class Lfu(EvictionPolicy):
    """Evicts the block used in the fewest events since it was loaded; its count is forgotten when it leaves."""

    name: ClassVar[str] = "lfu"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._uses = [0] * (context.layers * context.experts)

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        for block in blocks:
            self._uses[block] += 1

    def key(self, block: int) -> float:
        return self._uses[block]

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        return [*map(self._uses.__getitem__, blocks)]

    def forget(self, block: int) -> None:
        self._uses[block] = 0
