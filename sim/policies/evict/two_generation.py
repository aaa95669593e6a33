"""Least-stale, as two generations: what the current forward pass has not touched goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext

_TOUCHED = 1 << 50  # above every event, and exact in a float


class TwoGeneration(EvictionPolicy):
    """Evicts blocks that the current forward pass has not touched, first in first out, and then the others likewise.

    A touch puts a block at the tail of its queue, and so does its arrival. Source: Least-Stale of SpecMD, arXiv
    2602.03921, in the first of four public readings. On demand alone the queue is in the order of the last use, so
    that this is LRU; a prefetched block, which has arrived without being touched, is what tells them apart: LRU knows
    it by its use of long ago, this policy by its arrival.
    """

    name: ClassVar[str] = "two-generation"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._event = -1
        self._queued = [-1] * context.blocks  # event of the last touch or arrival
        self._touched = [-1] * context.blocks  # pass of the last touch

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._event = event
        for block in blocks:
            self._queued[block] = event
            self._touched[block] = event // self.context.layers

    def key(self, block: int) -> float:
        fresh = self._touched[block] == self._event // self.context.layers
        return self._queued[block] + _TOUCHED * fresh

    def admit(self, block: int) -> None:
        self._queued[block] = self._event
