"""An eviction policy of one's own: recency and frequency in one number, with a half-life between the two.

It replays beside others from this file:

    moetwin cache mixed --policies lru,lfu-global,belady --policy-file examples/half_life.py:HalfLife
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies import EvictionPolicy, PolicyContext


class HalfLife(EvictionPolicy):
    """Evicts the block whose uses weigh least, where a use loses half its weight in every ``half_life`` passes.

    A short half-life is LRU, an endless one is LFU. A block with uses in the passes u weighs sum 2^(u / half_life), but
    for a factor that all blocks have in common; the key is its logarithm, and so stands still between two uses. Source:
    the combined recency and frequency of Lee et al., "LRFU", IEEE Transactions on Computers 50(12), 2001; departure:
    time goes by forward passes, so that all layers age alike.
    """

    name: ClassVar[str] = "half-life"
    defaults: ClassVar[dict[str, Any]] = {"half_life": 16.0}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if self.options["half_life"] <= 0:
            raise ValueError(f"half_life must be above 0 passes, got {self.options['half_life']}")
        self._weight = np.full(context.blocks, -np.inf)

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        now = (event // self.context.layers) / self.options["half_life"]
        self._weight[blocks] = np.logaddexp2(self._weight[blocks], now)

    def key(self, block: int) -> float:
        return float(self._weight[block])
