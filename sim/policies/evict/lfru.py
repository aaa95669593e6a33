"""Least frequently and recently used: how often, by how long ago."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class Lfru(EvictionPolicy):
    """Evicts the block with the smallest f / (age + 1): f the events it was used in over the whole run, age the events
    of the whole model since the last of them.

    Source: arXiv 2608.07911.
    """

    name: ClassVar[str] = "lfru"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._uses = [0] * context.blocks
        self._last_use = [-1] * context.blocks
        self._event = -1

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._event = event
        for block in blocks:
            self._uses[block] += 1
            self._last_use[block] = event

    def key(self, block: int) -> float:
        return self._uses[block] / (self._event - self._last_use[block] + 1)
