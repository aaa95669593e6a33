"""Least-stale, as a weighted mix of the other readings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from sim.policies.base import PolicyContext
from sim.policies.evict.ewma_reuse import EwmaReuse


class Blend(EwmaReuse):
    """Evicts the block with the smallest weighted sum of freshness, regularity and height, each from 0 to 1.

    Freshness is 1 / (age + 1), the age in passes: 1 for what the current pass has touched, at most 1/2 for the rest.
    Regularity is 1 / (smoothed reuse interval in passes), as in ``ewma-reuse``, 0 where there is none. Height is
    (layer + 1) / L. Source: Least-Stale of SpecMD, arXiv 2602.03921, in the fourth of four public readings; its
    formula is open, the one here is chosen so that each other reading is one of the terms.
    """

    name: ClassVar[str] = "blend"
    defaults: ClassVar[Mapping[str, Any]] = {
        **EwmaReuse.defaults,
        "freshness": 0.5,  # chosen here, as the two that follow
        "regularity": 0.25,
        "height": 0.25,
    }

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        for name in ("freshness", "regularity", "height"):
            if not 0 <= self.options[name] < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {self.options[name]}")

    def key(self, block: int) -> float:
        weight, layers = self.options, self.context.layers
        age = self._event // layers - self._last[block] // layers
        fresh = weight["freshness"] * (1.0 / (age + 1))
        regular = weight["regularity"] * (layers / self._interval[block])
        high = weight["height"] * ((block // self.context.experts + 1) / layers)
        return float(fresh + regular + high)
