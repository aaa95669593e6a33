"""Prefetch the next layer's experts with the highest smoothed router scores, as HybriMoE's released code does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView
from sim.policies.evict.mrs import Mrs
from sim.policies.prefetch.checks import check_count


class MrsNext(PrefetchPolicy):
    """Copies the ``width`` experts of the next layer with the highest score S of :class:`~sim.policies.evict.mrs.Mrs`.

    Equal ones go by the lowest expert, and what has no score yet is not wanted. S is that of the passes before, since
    the next layer's router has not run. Source: the released code of HybriMoE (arXiv 2504.05897), where it stands in
    the place of the paper's impact-driven prefetching. Chosen here: after the last layer comes the first one of the
    next pass.
    """

    name: ClassVar[str] = "mrs-next"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    defaults: ClassVar[Mapping[str, Any]] = {**Mrs.defaults, "width": 0}  # 0: the experts of a token

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_count("width", self.options["width"], least=0)
        self._width = self.options["width"] or context.top_k
        self._mrs = Mrs(replace(context, options={name: self.options[name] for name in Mrs.defaults}))

    def observe_scores(self, layer: int, scores: Any) -> None:
        self._mrs.observe_scores(layer, scores)

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        context = self.context
        first = (view.layer + 1) % context.layers * context.experts
        scores = np.array(self._mrs.keys(range(first, first + context.experts)))
        ranking = np.argsort(-scores, kind="stable")[: self._width]
        wanted: list[int] = (ranking[scores[ranking] > 0] + first).tolist()
        return wanted
