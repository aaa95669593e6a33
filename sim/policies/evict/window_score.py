"""DALI's replacement: the workload of the last passes decides, and few blocks are swapped in a window."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import EvictionPolicy, PolicyContext, check_whole


class WindowScore(EvictionPolicy):
    """Keeps the blocks with the largest workload: tokens summed over the last ``window`` passes, this one included.

    At most ``swaps`` residents of a layer leave in each window of so many passes (pass // window numbers them); in a
    pool that all layers share, their budgets are one. Once it is spent, what misses is served and not kept, unless
    there is room. Source: DALI, arXiv 2602.03495, workload-aware cache replacement. Departure: DALI exchanges cached
    and uncached experts between two windows; on demand alone a block can come in only when it is used, so that the
    exchanges are made at the misses within a window.
    """

    name: ClassVar[str] = "window-score"
    bypass: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"window": 4, "swaps": 1}  # chosen here

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_whole(self.options, window=4096, swaps=65_536)  # the workload of every pass in the window is kept
        self.budget = self.options["swaps"] * (context.layers if context.shared else 1)
        self._tokens = np.zeros((self.options["window"], context.blocks), np.int64)  # by pass modulo window
        self._workload = np.zeros(context.blocks, np.int64)
        self._kept = [False] * context.blocks
        self._left = [0] * context.layers  # residents that have left in this window, by pool
        self._pass = -1
        self._layer = 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        number, self._layer = divmod(event, self.context.layers)
        if number != self._pass:
            self._advance(number)
        used, tokens = np.array(blocks, np.int64), np.array(counts, np.int64)
        self._tokens[number % len(self._tokens), used] += tokens
        self._workload[used] += tokens

    def _advance(self, number: int) -> None:
        """Forgets the passes that the window has left behind."""
        width = len(self._tokens)
        for old in range(max(self._pass + 1, number - width + 1), number + 1):
            self._workload -= self._tokens[old % width]
            self._tokens[old % width] = 0
        if number // width != self._pass // width:
            self._left = [0] * self.context.layers
        self._pass = number

    def key(self, block: int) -> float:
        return float(self._workload[block])

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        workload: list[float] = self._workload[[*blocks]].tolist()
        return workload

    def order(self, blocks: Collection[int], recency: Sequence[int]) -> list[int]:
        """The order of the keys, but that residents beyond the budget go after all that is not resident."""
        spare = self.budget - self._left[self._pool(self._layer)]
        going: list[int] = []
        staying: list[int] = []
        for block in super().order(blocks, recency):
            if not self._kept[block]:
                going.append(block)
            elif spare > 0:
                spare -= 1
                going.append(block)
            else:
                staying.append(block)
        return going + staying

    def admit(self, block: int) -> None:
        self._kept[block] = True

    def forget(self, block: int) -> None:
        self._left[self._pool(block // self.context.experts)] += self._kept[block]
        self._kept[block] = False

    def _pool(self, layer: int) -> int:
        return 0 if self.context.shared else layer
