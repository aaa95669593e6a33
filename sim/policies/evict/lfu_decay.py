"""Least frequently used, with counts that halve as time goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ldexp
from typing import Any, ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class LfuDecay(EvictionPolicy):
    """Evicts the block with the smallest count of events; all counts are halved every ``window`` events of the whole
    model. A count is kept when its block leaves: it fades by itself."""

    name: ClassVar[str] = "lfu-decay"
    defaults: ClassVar[Mapping[str, Any]] = {"window": 4096}  # chosen here

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if self.options["window"] < 1:
            raise ValueError(f"window must be at least 1, got {self.options['window']}")
        self._count = [0.0] * context.blocks  # as of ``_halvings``
        self._halvings = [0] * context.blocks
        self._now = 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._now = event // self.options["window"]
        for block in blocks:
            self._count[block] = self.key(block) + 1.0
            self._halvings[block] = self._now

    def key(self, block: int) -> float:
        return ldexp(self._count[block], self._halvings[block] - self._now)
