"""Least-stale, as the largest smoothed reuse interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class EwmaReuse(EvictionPolicy):
    """Evicts the block with the largest smoothed interval between its uses, in events of the whole model.

    interval <- (1 - beta) * interval + beta * (event - last use), the first interval as it is. A block with fewer than
    two uses has none and goes before all others. Intervals are of the router, not of the cache: they are kept when a
    block leaves. Source: Least-Stale of SpecMD, arXiv 2602.03921, in the second of four public readings.
    """

    name: ClassVar[str] = "ewma-reuse"
    defaults: ClassVar[Mapping[str, Any]] = {"beta": 0.25}  # chosen here

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if not 0 < self.options["beta"] <= 1:
            raise ValueError(f"beta must be above 0 and at most 1, got {self.options['beta']}")
        self._event = -1
        self._last = [-1] * context.blocks
        self._interval = [math.inf] * context.blocks

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._event = event
        beta, last, interval = self.options["beta"], self._last, self._interval
        for block in blocks:
            gap = event - last[block]
            if math.isfinite(interval[block]):
                interval[block] = (1.0 - beta) * interval[block] + beta * gap
            elif last[block] >= 0:
                interval[block] = gap
            last[block] = event

    def key(self, block: int) -> float:
        return -self._interval[block]
