"""Farthest next use: the bound on hits that needs to know the future."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, Future, PolicyContext


class Belady(EvictionPolicy):
    """Evicts the block whose next use is farthest, and does not keep one that is needed later than all residents.

    Source: Belady, *A study of replacement algorithms for a virtual-storage computer*, IBM Systems Journal 5(2), 1966,
    with bypass. It bounds the hit rate of equal-sized blocks; it is not optimal in time once a miss may run on the
    CPU or a transfer overlaps.
    """

    name: ClassVar[str] = "belady"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    bypass: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.future is None:
            raise ValueError(f"{self.name} must be given the future routing, got none")
        self._future: Future = context.future
        self._event = -1

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._event = event

    def key(self, block: int) -> float:
        return -self._future.next_use(block, self._event)
