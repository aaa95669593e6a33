"""A prefetch policy of one's own: what followed the experts of this layer before, will follow them again.

It runs in simulated time, and on a real device, from this file:

    moetwin simulate mixed --policy-file examples/successors.py:Successors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies import PolicyContext, PrefetchPolicy, PrefetchView


class Successors(PrefetchPolicy):
    """Wants the ``width`` experts of the next layer that came most often after those that this layer has just used.

    Source: the affinity between experts of neighbouring layers in Yao et al., "ExFlow", arXiv 2401.08383; departure: it
    is counted while the run goes on, and serves to copy experts ahead of time, not to place them.
    """

    name: ClassVar[str] = "successors"
    defaults: ClassVar[dict[str, Any]] = {"width": 4}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if self.options["width"] < 1:
            raise ValueError(f"width must be at least 1 expert, got {self.options['width']}")
        self._followed = np.zeros((context.layers, context.experts, context.experts), np.int32)
        self._used = np.array([], np.int64)

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        layer, used = event % self.context.layers, np.array(blocks, np.int64) % self.context.experts
        if layer > 0:
            self._followed[layer - 1][np.ix_(self._used, used)] += 1
        self._used = used

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        votes = self._followed[view.layer][self._used].sum(axis=0)  # none after the last layer
        best = np.argsort(-votes, kind="stable")[: self.options["width"]]
        return [(view.layer + 1) * self.context.experts + int(expert) for expert in best if votes[expert] > 0]
