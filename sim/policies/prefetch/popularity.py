"""Prefetch what the next layer has used most often so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView
from sim.policies.prefetch.checks import check_count


class Popularity(PrefetchPolicy):
    """Copies the ``width`` experts of the next layer that were used in the most events of the run, most used first.

    Equally used ones go by the lowest expert, and what was never used is not wanted. After the last layer comes the
    first one of the next pass. Chosen here, as the least that a predictor has to beat: it knows nothing of the request.
    """

    name: ClassVar[str] = "popularity"
    defaults: ClassVar[Mapping[str, Any]] = {"width": 0}  # 0: the experts of a token

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_count("width", self.options["width"], least=0)
        self._width = self.options["width"] or context.top_k
        self._uses = np.zeros((context.layers, context.experts), np.int64)

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._uses.reshape(-1)[blocks] += 1

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        layer = (view.layer + 1) % self.context.layers
        uses = self._uses[layer]
        ranking = np.argsort(-uses, kind="stable")[: self._width]
        wanted: list[int] = (ranking[uses[ranking] > 0] + layer * self.context.experts).tolist()
        return wanted
